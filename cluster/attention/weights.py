"""The tensors that an attention replica holds: everything of the checkpoint except the experts.

Projections that share an input are stored as one matrix (q, k, v; gate and up of a dense MLP), so a layer makes one
product of them. `lm_head` is the embedding itself where the model ties them, whether or not the file stores it
twice."""

from dataclasses import dataclass

import torch

from ...checkpoint import Checkpoint, ProgressCallback, ProgressMeter
from ...model_config import ModelConfig


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
    reader = _Reader(checkpoint, dtype, device, meter)
    embed = reader.whole("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    layers = tuple(_load_layer(reader, config, layer_id) for layer_id in range(config.num_layers))
    norm = reader.whole("model.norm.weight", config.hidden_size)
    if config.tie_word_embeddings:
        lm_head = embed
    else:
        lm_head = reader.whole("lm_head.weight", config.vocab_size, config.hidden_size)
    meter.finish()
    return AttentionWeights(embed=embed, layers=layers, norm=norm, lm_head=lm_head)


def _load_layer(reader: "_Reader", config: ModelConfig, layer_id: int) -> LayerWeights:
    prefix, hidden = f"model.layers.{layer_id}.", config.hidden_size
    mlp: dict[str, torch.Tensor] = {}
    if config.is_moe_layer(layer_id):
        mlp["gate"] = reader.whole(prefix + "mlp.gate.weight", config.num_experts, hidden)
    else:
        width = config.intermediate_size
        mlp["w13"] = reader.stacked([(prefix + f"mlp.{n}_proj.weight", width) for n in ("gate", "up")], hidden)
        mlp["w2"] = reader.whole(prefix + "mlp.down_proj.weight", hidden, width)
    q_norm = reader.whole(prefix + "self_attn.q_norm.weight", config.head_dim)
    k_norm = reader.whole(prefix + "self_attn.k_norm.weight", config.head_dim)
    sizes = {"q": config.q_size, "k": config.kv_size, "v": config.kv_size}
    return LayerWeights(
        input_norm=reader.whole(prefix + "input_layernorm.weight", hidden),
        qkv=reader.stacked([(prefix + f"self_attn.{n}_proj.weight", size) for n, size in sizes.items()], hidden),
        qk_norm=torch.cat([q_norm.expand(config.num_heads, -1), k_norm.expand(config.num_kv_heads, -1)]),
        o=reader.whole(prefix + "self_attn.o_proj.weight", hidden, config.q_size),
        post_norm=reader.whole(prefix + "post_attention_layernorm.weight", hidden),
        **mlp,
    )


class _Reader:
    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str, meter: ProgressMeter
    ) -> None:
        self.checkpoint, self.dtype, self.device, self.meter = checkpoint, dtype, device, meter

    def whole(self, name: str, *shape: int) -> torch.Tensor:
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.checkpoint.read_into(name, out, meter=self.meter)
        return out

    def stacked(self, parts: list[tuple[str, int]], columns: int) -> torch.Tensor:
        """Matrices with the same number of columns, one below the other."""
        out = torch.empty(sum(rows for _, rows in parts), columns, dtype=self.dtype, device=self.device)
        start = 0
        for name, rows in parts:
            self.checkpoint.read_into(name, out[start : start + rows], meter=self.meter)
            start += rows
        return out


def _bytes_on_disk(checkpoint: Checkpoint) -> int:
    tied = checkpoint.config.tie_word_embeddings
    return sum(
        checkpoint.entry(name).num_bytes
        for name in checkpoint.names
        if ".mlp.experts." not in name and not (tied and name == "lm_head.weight")
    )
