"""The tensors that an attention replica holds: everything of the checkpoint except the experts.

Projections that share an input are stored as one matrix (q, k, v; gate and up of a dense MLP), so a layer makes one
product of them. `lm_head` is the embedding itself where the model ties them, whether or not the file stores it
twice. All tensors are allocated first and then read at once (`parallel_reads.py`)."""

from dataclasses import dataclass, replace

import torch

from ...checkpoint import Checkpoint, ProgressCallback, ProgressMeter
from ...model_config import ModelConfig
from ...parallel_reads import Read, read_all


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer. Exactly one of `gate` (MoE layer) and `w13`, `w2` (dense MLP) is there."""

    input_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [q_size + 2 * kv_size, hidden]
    qk_norm: torch.Tensor  # [num_heads + num_kv_heads, head_dim]: q_norm for each head, then k_norm for each kv head
    o: torch.Tensor  # [hidden, q_size]
    post_norm: torch.Tensor  # [hidden]
    gate: torch.Tensor | None = None  # [num_experts, hidden]
    w13: torch.Tensor | None = None  # [2 * intermediate, hidden], gate first
    w2: torch.Tensor | None = None  # [hidden, intermediate]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    embed: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [hidden]
    lm_head: torch.Tensor  # [vocab, hidden]; the same tensor as `embed` where tied


def load_attention_weights(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: ProgressCallback | None = None,
) -> AttentionWeights:
    config = checkpoint.config
    meter = ProgressMeter("attention weights", _bytes_on_disk(checkpoint), progress)
    reader = _Reader(checkpoint, dtype, device)
    embed = reader.whole("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    lm_head = embed
    if not config.tie_word_embeddings:
        lm_head = reader.whole("lm_head.weight", config.vocab_size, config.hidden_size)
    made = [_load_layer(reader, config, layer_id) for layer_id in range(config.num_layers)]
    norm = reader.whole("model.norm.weight", config.hidden_size)
    reader.read(meter)
    layers = tuple(replace(layer, qk_norm=_by_head(layer.qk_norm, config)) for layer in made)
    meter.finish()
    return AttentionWeights(embed=embed, layers=layers, norm=norm, lm_head=lm_head)


def _load_layer(reader: "_Reader", config: ModelConfig, layer_id: int) -> LayerWeights:
    """Tensors that `reader.read` fills; `qk_norm` is [2, head_dim] until then."""
    prefix, hidden = f"model.layers.{layer_id}.", config.hidden_size
    mlp: dict[str, torch.Tensor] = {}
    if config.is_moe_layer(layer_id):
        mlp["gate"] = reader.whole(prefix + "mlp.gate.weight", config.num_experts, hidden)
    else:
        width = config.intermediate_size
        mlp["w13"] = reader.stacked([(prefix + f"mlp.{n}_proj.weight", width) for n in ("gate", "up")], hidden)
        mlp["w2"] = reader.whole(prefix + "mlp.down_proj.weight", hidden, width)
    sizes = {"q": config.q_size, "k": config.kv_size, "v": config.kv_size}
    return LayerWeights(
        input_norm=reader.whole(prefix + "input_layernorm.weight", hidden),
        qkv=reader.stacked([(prefix + f"self_attn.{n}_proj.weight", size) for n, size in sizes.items()], hidden),
        qk_norm=reader.rows([prefix + f"self_attn.{n}_norm.weight" for n in ("q", "k")], config.head_dim),
        o=reader.whole(prefix + "self_attn.o_proj.weight", hidden, config.q_size),
        post_norm=reader.whole(prefix + "post_attention_layernorm.weight", hidden),
        **mlp,
    )


def _by_head(norms: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """[2, head_dim] -> [num_heads + num_kv_heads, head_dim]"""
    return torch.cat([norms[:1].expand(config.num_heads, -1), norms[1:].expand(config.num_kv_heads, -1)])


class _Reader:
    """Hands out tensors at once and fills them all in `read`, in the order in which they were asked for."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.reads: list[Read] = []

    def whole(self, name: str, *shape: int) -> torch.Tensor:
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.reads.append(Read(name, out))
        return out

    def stacked(self, parts: list[tuple[str, int]], columns: int) -> torch.Tensor:
        """Matrices with the same number of columns, one below the other."""
        out = torch.empty(sum(rows for _, rows in parts), columns, dtype=self.dtype, device=self.device)
        start = 0
        for name, rows in parts:
            self.reads.append(Read(name, out[start : start + rows]))
            start += rows
        return out

    def rows(self, names: list[str], columns: int) -> torch.Tensor:
        """Vectors, one below the other."""
        out = torch.empty(len(names), columns, dtype=self.dtype, device=self.device)
        self.reads += [Read(name, row) for name, row in zip(names, out, strict=True)]
        return out

    def read(self, meter: ProgressMeter) -> None:
        read_all(self.checkpoint, self.reads, meter=meter)


def _bytes_on_disk(checkpoint: Checkpoint) -> int:
    tied = checkpoint.config.tie_word_embeddings
    return sum(
        checkpoint.entry(name).num_bytes
        for name in checkpoint.names
        if ".mlp.experts." not in name and not (tied and name == "lm_head.weight")
    )
