"""What a checkpoint says about itself: `config.json` and `generation_config.json` as frozen records.

Nothing about a model is hard-coded anywhere else: shapes, thetas, which layers have experts and which ids end a
text all come from here. Both spellings of config.json are read (`num_experts`/`num_local_experts`, `rope_theta` +
`rope_scaling`/ `rope_parameters`, `torch_dtype`/`dtype`). What this program cannot serve exactly is refused by name
instead of being served approximately. The reference for defaults is transformers' Qwen3MoeConfig and Qwen3Config.
Needs no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError

ARCHITECTURES = {"qwen3_moe": "Qwen3MoeForCausalLM", "qwen3": "Qwen3ForCausalLM"}  # model_type -> class name
QUANTIZATION_GROUP = 128  # weights that share a scale, and the side of an fp8 block


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. `factor` 1 and kind "default" is plain RoPE; "yarn" stretches it (static, by `factor`)."""

    theta: float
    kind: str = "default"  # "default" or "yarn"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None  # None = derived from factor (and the mscales)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shapes and constants of one model; dense Qwen3 is `num_experts` 0."""

    model_type: str
    hidden_size: int
    intermediate_size: int  # width of a dense MLP
    moe_intermediate_size: int  # width of one expert; 0 in a dense model
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    dtype: str  # of the weights on disk, as config.json names it
    num_experts: int = 0
    top_k: int = 0  # experts a token goes to
    norm_topk_prob: bool = False
    mlp_only_layers: tuple[int, ...] = ()
    decoder_sparse_step: int = 1
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def is_moe_layer(self, layer_id: int) -> bool:
        return (
            self.num_experts > 0
            and layer_id not in self.mlp_only_layers
            and (layer_id + 1) % self.decoder_sparse_step == 0
        )

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_layers) if self.is_moe_layer(i))

    @property
    def attention_parity_tokens(self) -> int:
        """The context at which attention costs a new token as many operations as all products with weights together."""
        num_moe = len(self.moe_layer_ids)
        per_layer = self.hidden_size * (2 * self.q_size + 2 * self.kv_size)
        mlps = num_moe * (3 * self.top_k * self.moe_intermediate_size + self.num_experts) * self.hidden_size
        mlps += (self.num_layers - num_moe) * 3 * self.hidden_size * self.intermediate_size
        return (self.num_layers * per_layer + mlps) // (2 * self.num_layers * self.q_size)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def expert_numel(self) -> int:
        """Weights of one expert: gate, up and down."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        return 2 * self.num_layers * self.kv_size * element_bytes

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        path = Path(folder) / "config.json"
        return cls.from_mapping(_read_json(path), file=str(path))

    @classmethod
    def from_mapping(cls, raw: Mapping[str, Any], *, file: str = "config.json") -> "ModelConfig":
        fields = _Fields(raw, file)
        model_type = _checked_model_type(fields)
        _refuse_unsupported(fields)
        moe = model_type == "qwen3_moe"
        hidden_size, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
        num_experts = fields.count("num_local_experts", "num_experts", minimum=0) if moe else 0
        config = cls(
            model_type=model_type,
            hidden_size=hidden_size,
            intermediate_size=fields.count("intermediate_size", default=0, minimum=0),
            moe_intermediate_size=fields.count("moe_intermediate_size") if num_experts else 0,
            num_layers=fields.count("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=fields.count("num_key_value_heads", default=num_heads),
            head_dim=fields.count("head_dim", default=hidden_size // num_heads if moe else 128),
            vocab_size=fields.count("vocab_size"),
            max_position_embeddings=fields.count("max_position_embeddings"),
            rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
            rope=_read_rope(fields),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            dtype=str(fields.first("dtype", "torch_dtype") or "float32").removeprefix("torch."),
            num_experts=num_experts,
            top_k=fields.count("num_experts_per_tok") if num_experts else 0,
            norm_topk_prob=fields.flag("norm_topk_prob"),
            mlp_only_layers=tuple(fields.first("mlp_only_layers") or ()) if moe else (),
            decoder_sparse_step=fields.count("decoder_sparse_step", default=1) if moe else 1,
            bos_token_id=fields.first("bos_token_id"),
            eos_token_ids=_ids(fields.first("eos_token_id")),
        )
        config._check(file)
        return config

    def _check(self, file: str) -> None:
        def need(ok: bool, message: str) -> None:
            if not ok:
                raise CheckpointError(f"{message}; correct config.json or take the publisher's", file=file)

        need(
            self.num_heads % self.num_kv_heads == 0,
            f"num_attention_heads {self.num_heads} is not a multiple of num_key_value_heads {self.num_kv_heads}",
        )
        need(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd: RoPE rotates pairs")
        need(self.top_k <= self.num_experts, f"num_experts_per_tok {self.top_k} exceeds {self.num_experts} experts")
        dense = len(self.moe_layer_ids) < self.num_layers
        need(not dense or self.intermediate_size > 0, "there are dense layers but no intermediate_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What generation_config.json asks for where a request says nothing. Greedy and plain where the file is absent."""

    eos_token_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    do_sample: bool = False
    max_new_tokens: int | None = None

    @classmethod
    def from_folder(cls, folder: str | Path, config: ModelConfig) -> "GenerationDefaults":
        path = Path(folder) / "generation_config.json"
        raw = _read_json(path) if path.exists() else {}
        fields = _Fields(raw, str(path))
        return cls(
            eos_token_ids=_ids(fields.first("eos_token_id")) or config.eos_token_ids,
            temperature=fields.number("temperature", default=1.0),
            top_p=fields.number("top_p", default=1.0),
            top_k=fields.count("top_k", default=0, minimum=0),
            min_p=fields.number("min_p", default=0.0),
            repetition_penalty=fields.number("repetition_penalty", default=1.0),
            do_sample=fields.flag("do_sample"),
            max_new_tokens=fields.first("max_new_tokens"),
        )


class _Fields:
    """A JSON mapping whose readers check type and range and name the field in their error."""

    def __init__(self, raw: Mapping[str, Any], file: str) -> None:
        self.raw, self.file = raw, file

    def first(self, *names: str) -> Any:
        """The first of these names that is present and not null."""
        return next((self.raw[n] for n in names if self.raw.get(n) is not None), None)

    def count(self, *names: str, default: int | None = None, minimum: int = 1) -> int:
        value = self.first(*names)
        value = default if value is None else value
        if value is None:
            raise self.error(" or ".join(names), "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(names[0], f"is {value!r}, expected a whole number of at least {minimum}")
        return value

    def number(self, name: str, *, default: float) -> float:
        value = self.first(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, f"is {value!r}, expected a number")
        return float(value)

    def flag(self, name: str) -> bool:
        return bool(self.first(name) or False)

    def error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{name} {problem}; correct it or take the publisher's file", file=self.file)


def _checked_model_type(fields: _Fields) -> str:
    model_type = fields.first("model_type")
    architectures = fields.first("architectures") or []
    if model_type not in ARCHITECTURES or (architectures and ARCHITECTURES[model_type] not in architectures):
        raise CheckpointError(
            f"model_type {model_type!r} with architectures {architectures} is not supported; "
            f"serve one of {', '.join(ARCHITECTURES.values())} (Qwen3 MoE or dense)",
            file=fields.file,
        )
    return str(model_type)


def _refuse_unsupported(fields: _Fields) -> None:
    quantization = fields.first("quantization_config", "compression_config")
    if quantization:
        known = isinstance(quantization, Mapping)
        method = quantization.get("quant_method", "unknown") if known else quantization
        reason = unsupported_quantization(quantization) if known else "only gptq, awq and fp8 are supported"
        if reason:
            raise CheckpointError(
                f"the checkpoint is quantized ({method}) in a way that is not supported: {reason}; "
                "take the bfloat16 release of the model",
                file=fields.file,
            )
    if fields.flag("use_sliding_window") and fields.first("sliding_window"):
        raise fields.error("use_sliding_window", "is on: only full attention is supported")
    if "sliding_attention" in (fields.first("layer_types") or ()):
        raise fields.error("layer_types", "names sliding_attention: only full_attention is supported")
    if fields.flag("attention_bias") or fields.flag("qkv_bias"):
        raise fields.error("attention_bias", "is on: Qwen3 projections have no bias")
    if fields.first("hidden_act") not in (None, "silu"):
        raise fields.error("hidden_act", f"is {fields.first('hidden_act')!r}: only silu is supported")
    if fields.first("shared_expert_intermediate_size"):
        raise fields.error("shared_expert_intermediate_size", "is not 0: Qwen3 has no shared expert")


def _read_rope(fields: _Fields) -> RopeConfig:
    """Old spelling: rope_theta beside rope_scaling (or null). New: both inside rope_parameters."""
    raw = fields.first("rope_scaling", "rope_parameters") or {}
    if not isinstance(raw, Mapping):
        raise fields.error("rope_parameters", f"is {raw!r}, expected a mapping")
    rope = _Fields(raw, fields.file)
    kind = rope.first("rope_type", "type") or "default"
    theta = rope.number("rope_theta", default=fields.number("rope_theta", default=10000.0))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind != "yarn":
        raise fields.error("rope_scaling", f"has rope_type {kind!r}: only default and yarn are supported")
    max_position = fields.count("max_position_embeddings")
    # a value beside the mapping wins over one inside it, as in the reference
    original = fields.first("original_max_position_embeddings") or rope.count(
        "original_max_position_embeddings", default=max_position
    )
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=rope.number("factor", default=max_position / original),
        original_max_position_embeddings=original,
        attention_factor=rope.first("attention_factor"),
        beta_fast=rope.number("beta_fast", default=32.0) or 32.0,
        beta_slow=rope.number("beta_slow", default=1.0) or 1.0,
        mscale=rope.first("mscale"),
        mscale_all_dim=rope.first("mscale_all_dim"),
        truncate=raw.get("truncate", True),
    )


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            "the file is missing; point --model at a folder in Hugging Face layout", file=str(path)
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"the file cannot be read ({error}); download it again", file=str(path)) from None
    if not isinstance(raw, dict):
        raise CheckpointError("the file holds no JSON object; download it again", file=str(path))
    return raw


def unsupported_quantization(config: Mapping[str, Any]) -> str | None:
    """Why a config.json's `quantization_config` cannot be served, or None."""
    method = config.get("quant_method")
    if method == "fp8":
        block, wanted = list(config.get("weight_block_size") or ()), [QUANTIZATION_GROUP, QUANTIZATION_GROUP]
        return None if block == wanted else f"weight_block_size is {block}, not {wanted}"
    if method not in ("gptq", "awq"):
        return "only gptq, awq and fp8 are supported"
    expected: dict[str, Any] = {"bits": 4, "group_size": QUANTIZATION_GROUP}
    expected |= {"desc_act": False, "checkpoint_format": "gptq"} if method == "gptq" else {"version": "gemm"}
    wrong = [f"{k} is {config[k]!r}, not {v!r}" for k, v in expected.items() if config.get(k, v) != v]
    return "; ".join(wrong) or None
