"""Write a checkpoint of any Qwen3 configuration with random, seeded weights, in Hugging Face layout.

For tests, parity runs and demonstrations of the machinery: its text is noise. The scales are chosen so that the
noise is varied: activations keep unit size through any depth, attention and gate are neither flat nor one-hot, and
logits spread enough that greedy text does not stick. A tensor's values depend on (seed, its name) alone, so the
same seed gives the same model whatever the file sizes, and two configurations share what they share."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .checkpoint import INDEX_NAME, SINGLE_NAME
from .errors import ConfigError
from .model_config import ARCHITECTURES, ModelConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny-moe": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "tie_word_embeddings": True,
    },
    "small-moe": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "tie_word_embeddings": True,
    },
    "tiny-dense": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
}
_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_MOE_DEFAULTS: dict[str, Any] = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeCheckpoint:
    folder: Path
    num_tensors: int
    num_parameters: int
    num_bytes: int
    num_files: int


def make_checkpoint(
    folder: str | Path,
    config: str | Mapping[str, Any],
    *,
    seed: int = 0,
    dtype: str | None = None,
    max_shard_bytes: int = 4 * 10**9,
    fused_experts: bool = False,
    tokenizer_folder: str | Path | None = None,
    generation: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MadeCheckpoint:
    """`config` is the name of a preset or the contents of a config.json (absent fields get Qwen3's values); `dtype`
    None is the config's, bfloat16 where it names none.
    `tokenizer_folder` None copies the tokenizer carried with the package where the vocabulary is large enough."""
    raw = complete_config(config, dtype)
    dtype = str(raw.get("dtype") or raw["torch_dtype"])
    parsed = ModelConfig.from_mapping(raw, file="the given configuration")
    shapes = tensor_shapes(parsed, fused_experts=fused_experts)
    folder = Path(folder)
    _clear(folder, overwrite)
    _write_json(folder / "config.json", raw)
    _write_json(folder / "generation_config.json", generation or _generation_config(raw))
    _copy_tokenizer(folder, tokenizer_folder, parsed.vocab_size)
    element_bytes = DTYPES[dtype].itemsize
    files = list(_split(shapes, element_bytes, max_shard_bytes))
    num_bytes, done = sum(math.prod(s) for s in shapes.values()) * element_bytes, 0
    weight_map = {}
    for number, names in enumerate(files, start=1):
        name = SINGLE_NAME if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {n: random_tensor(n, shapes[n], parsed, seed).to(DTYPES[dtype]) for n in names}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, name))
        done += sum(t.numel() for t in tensors.values()) * element_bytes
        if progress is not None:
            progress(done, num_bytes)
    if len(files) > 1:
        _write_json(folder / INDEX_NAME, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
    return MadeCheckpoint(
        folder=folder,
        num_tensors=len(shapes),
        num_parameters=num_bytes // element_bytes,
        num_bytes=num_bytes,
        num_files=len(files),
    )


def complete_config(config: str | Mapping[str, Any], dtype: str | None = None) -> dict[str, Any]:
    """A full config.json from a preset's name or a partial mapping."""
    if isinstance(config, str):
        if config not in PRESETS:
            raise ConfigError("config", config, f"a config.json's contents or one of {', '.join(PRESETS)}")
        config = PRESETS[config]
    model_type = config.get("model_type", "qwen3_moe")
    raw = dict(_DEFAULTS)
    if model_type == "qwen3_moe":
        raw |= _MOE_DEFAULTS
    if "rope_parameters" in config:
        del raw["rope_theta"], raw["rope_scaling"]
    raw |= {"model_type": model_type, "architectures": [ARCHITECTURES.get(model_type, "unknown")]} | dict(config)
    if raw["eos_token_id"] == _DEFAULTS["eos_token_id"] >= raw.get("vocab_size", 0):
        raw |= {"bos_token_id": None, "eos_token_id": None}  # a small vocabulary has no end unless it is given
    own = [raw.pop(key, None) for key in ("dtype", "torch_dtype")]
    dtype = dtype or own[0] or own[1] or "bfloat16"
    if dtype not in DTYPES:
        raise ConfigError("dtype", dtype, f"one of {', '.join(DTYPES)}")
    raw["dtype" if "rope_parameters" in config else "torch_dtype"] = dtype
    return raw


def tensor_shapes(config: ModelConfig, *, fused_experts: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, in the order that released ones have."""
    hidden = config.hidden_size
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer_id in range(config.num_layers):
        prefix = f"model.layers.{layer_id}."
        out[prefix + "self_attn.q_proj.weight"] = (config.q_size, hidden)
        out[prefix + "self_attn.k_proj.weight"] = (config.kv_size, hidden)
        out[prefix + "self_attn.v_proj.weight"] = (config.kv_size, hidden)
        out[prefix + "self_attn.o_proj.weight"] = (hidden, config.q_size)
        out[prefix + "self_attn.q_norm.weight"] = (config.head_dim,)
        out[prefix + "self_attn.k_norm.weight"] = (config.head_dim,)
        if config.is_moe_layer(layer_id):
            out[prefix + "mlp.gate.weight"] = (config.num_experts, hidden)
            out |= _expert_shapes(config, prefix + "mlp.experts.", fused_experts)
        else:
            out |= _mlp_shapes(prefix + "mlp.", config.intermediate_size, hidden)
        out[prefix + "input_layernorm.weight"] = (hidden,)
        out[prefix + "post_attention_layernorm.weight"] = (hidden,)
    out["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        out["lm_head.weight"] = (config.vocab_size, hidden)
    return out


def random_tensor(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> torch.Tensor:
    """float32 values of one tensor. A fused one holds what the single experts' tensors would."""
    prefix, is_experts, part = name.partition(".mlp.experts.")
    if is_experts and part in ("gate_up_proj", "down_proj"):
        single = [f"{prefix}.mlp.experts.{expert}." for expert in range(shape[0])]
        parts = ("gate", "up") if part == "gate_up_proj" else ("down",)
        rows = (shape[1] // len(parts), shape[2])
        return torch.stack(
            [torch.cat([random_tensor(f"{s}{p}_proj.weight", rows, config, seed) for p in parts]) for s in single]
        )
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    values = torch.randn(shape, generator=generator)
    mean, deviation = _scale(name, shape, config)
    return values.mul_(deviation).add_(mean)


def _scale(name: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[float, float]:
    fan_in = 1.0 / math.sqrt(shape[-1])
    if name.endswith("_norm.weight"):
        return 1.4, 0.1  # queries and keys: scores of deviation 2, so that attention chooses
    if name.endswith("norm.weight"):
        return 1.0, 0.1
    if name.endswith("embed_tokens.weight"):
        return 0.0, 3.0 * fan_in if config.tie_word_embeddings else 1.0
    if name.endswith("lm_head.weight"):
        return 0.0, 3.0 * fan_in
    if name.endswith("mlp.gate.weight"):
        return 0.0, 1.5 * fan_in
    if "down_proj" in name:
        return 0.0, 2.0 * fan_in  # silu(gate) * up has a deviation near one half
    return 0.0, fan_in


def _expert_shapes(config: ModelConfig, prefix: str, fused: bool) -> dict[str, tuple[int, ...]]:
    hidden, width, num = config.hidden_size, config.moe_intermediate_size, config.num_experts
    if fused:
        return {prefix + "gate_up_proj": (num, 2 * width, hidden), prefix + "down_proj": (num, hidden, width)}
    out: dict[str, tuple[int, ...]] = {}
    for expert in range(num):
        out |= _mlp_shapes(f"{prefix}{expert}.", width, hidden)
    return out


def _mlp_shapes(prefix: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        prefix + "gate_proj.weight": (width, hidden),
        prefix + "up_proj.weight": (width, hidden),
        prefix + "down_proj.weight": (hidden, width),
    }


def _split(shapes: Mapping[str, tuple[int, ...]], element_bytes: int, max_bytes: int) -> Iterator[list[str]]:
    """Names of each file, filled in order."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * element_bytes
        if names and size + num_bytes > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += num_bytes
    yield names


def _clear(folder: Path, overwrite: bool) -> None:
    """Weights of another model must not stay beside these."""
    folder.mkdir(parents=True, exist_ok=True)
    old = [*folder.glob("*.safetensors"), *folder.glob(INDEX_NAME)]
    if old and not overwrite:
        raise ConfigError("folder", str(folder), "a folder without weights; name another one, or ask to overwrite")
    for path in old:
        path.unlink()


def _generation_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What the released models recommend for thinking."""
    eos = raw.get("eos_token_id")
    ids = [i for i in (*(eos if isinstance(eos, list) else [eos]), raw.get("bos_token_id")) if i is not None]
    return {
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_id": ids,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
    }


def _copy_tokenizer(folder: Path, source: str | Path | None, vocab_size: int) -> None:
    if source is None:
        source = Path(__file__).parent / "router" / "gateway" / "qwen3"
        if vocab_size < 151669:  # ids of the carried tokenizer; a smaller model has none
            return
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, folder / name)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
