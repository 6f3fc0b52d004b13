"""The tensors that an attention replica holds: everything of the checkpoint except the experts.

Projections that share an input are stored as one matrix (q, k, v; gate and up of a dense MLP), so a layer makes one
product of them. `lm_head` is the embedding itself where the model ties them, whether or not the file stores it
twice. All tensors are allocated first and then read at once (`parallel_reads.py`). Projections that the checkpoint
stores in fp8 may stay so (`keep_fp8`), for kernels that read them; else they become `dtype` as they are read."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ...checkpoint import Checkpoint, ProgressCallback, ProgressMeter
from ...kernels.dense_fp8 import pack_fp8, takes
from ...model_config import ModelConfig
from ...parallel_reads import Read, read_all
from ...quantized import GROUP, Fp8Matrix, quantized_form

Matrix = Any  # torch.Tensor; `keep_fp8`: or Fp8Weight, which plain torch, that never asks for it, need not know


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer. Exactly one of `gate` (MoE layer) and `w13`, `w2` (dense MLP) is there."""

    input_norm: torch.Tensor  # [hidden]
    qkv: Matrix  # [q_size + 2 * kv_size, hidden]
    qk_norm: torch.Tensor  # [num_heads + num_kv_heads, head_dim]: q_norm for each head, then k_norm for each kv head
    o: Matrix  # [hidden, q_size]
    post_norm: torch.Tensor  # [hidden]
    gate: torch.Tensor | None = None  # [num_experts, hidden]
    w13: Matrix | None = None  # [2 * intermediate, hidden], gate first
    w2: Matrix | None = None  # [hidden, intermediate]


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
    keep_fp8: bool = False,
    progress: ProgressCallback | None = None,
) -> AttentionWeights:
    config = checkpoint.config
    meter = ProgressMeter("attention weights", _bytes_on_disk(checkpoint), progress)
    reader = _Reader(checkpoint, dtype, device, keep_fp8=keep_fp8)
    embed = reader.whole("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    lm_head = embed
    if not config.tie_word_embeddings:
        lm_head = reader.whole("lm_head.weight", config.vocab_size, config.hidden_size)
    made = [_load_layer(reader, config, layer_id) for layer_id in range(config.num_layers)]
    norm = reader.whole("model.norm.weight", config.hidden_size)
    reader.read(meter)
    layers = tuple(_finished(layer, config) for layer in made)
    meter.finish()
    return AttentionWeights(embed=embed, layers=layers, norm=norm, lm_head=lm_head)


def _load_layer(reader: "_Reader", config: ModelConfig, layer_id: int) -> LayerWeights:
    """Tensors that `reader.read` fills; until then `qk_norm` is [2, head_dim] and a matrix may be unpacked fp8."""
    prefix, hidden = f"model.layers.{layer_id}.", config.hidden_size
    mlp: dict[str, Matrix] = {}
    if config.is_moe_layer(layer_id):
        mlp["gate"] = reader.whole(prefix + "mlp.gate.weight", config.num_experts, hidden)
    else:
        width = config.intermediate_size
        mlp["w13"] = reader.stacked([(prefix + f"mlp.{n}_proj.weight", width) for n in ("gate", "up")], hidden)
        mlp["w2"] = reader.stacked([(prefix + "mlp.down_proj.weight", hidden)], width)
    sizes = {"q": config.q_size, "k": config.kv_size, "v": config.kv_size}
    return LayerWeights(
        input_norm=reader.whole(prefix + "input_layernorm.weight", hidden),
        qkv=reader.stacked([(prefix + f"self_attn.{n}_proj.weight", size) for n, size in sizes.items()], hidden),
        qk_norm=reader.rows([prefix + f"self_attn.{n}_norm.weight" for n in ("q", "k")], config.head_dim),
        o=reader.stacked([(prefix + "self_attn.o_proj.weight", hidden)], config.q_size),
        post_norm=reader.whole(prefix + "post_attention_layernorm.weight", hidden),
        **mlp,
    )


def _finished(layer: LayerWeights, config: ModelConfig) -> LayerWeights:
    packed: dict[str, Any] = {
        name: pack_fp8(matrix.values, matrix.scales)
        for name in ("qkv", "o", "w13", "w2")
        if isinstance(matrix := getattr(layer, name), Fp8Matrix)
    }
    return replace(layer, qk_norm=_by_head(layer.qk_norm, config), **packed)


def _by_head(norms: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """[2, head_dim] -> [num_heads + num_kv_heads, head_dim]"""
    return torch.cat([norms[:1].expand(config.num_heads, -1), norms[1:].expand(config.num_kv_heads, -1)])


class _Reader:
    """Hands out tensors at once and fills them all in `read`, in the order in which they were asked for."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str, *, keep_fp8: bool
    ) -> None:
        self.checkpoint, self.dtype, self.device, self.keep_fp8 = checkpoint, dtype, device, keep_fp8
        self.reads: list[Read] = []

    def whole(self, name: str, *shape: int) -> torch.Tensor:
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.reads.append(Read(name, out))
        return out

    def stacked(self, parts: list[tuple[str, int]], columns: int) -> Matrix:
        """Matrices with the same number of columns, one below the other."""
        num_rows = sum(rows for _, rows in parts)
        if self.keep_fp8 and all(self._is_fp8(name, rows, columns) for name, rows in parts):
            values = torch.empty(num_rows, columns, dtype=torch.float8_e4m3fn, device=self.device)
            scales = torch.empty(num_rows // GROUP, columns // GROUP, dtype=torch.float32, device=self.device)
            self._read_stacked(parts, values)
            self._read_stacked([(f"{name}_scale_inv", rows // GROUP) for name, rows in parts], scales)
            return Fp8Matrix(values, scales)
        out = torch.empty(num_rows, columns, dtype=self.dtype, device=self.device)
        self._read_stacked(parts, out)
        return out

    def _read_stacked(self, parts: list[tuple[str, int]], out: torch.Tensor) -> None:
        start = 0
        for name, rows in parts:
            self.reads.append(Read(name, out[start : start + rows]))
            start += rows

    def _is_fp8(self, name: str, rows: int, columns: int) -> bool:
        return takes(rows, columns) and quantized_form(self.checkpoint, name.removesuffix(".weight")) == "fp8"

    def rows(self, names: list[str], columns: int) -> torch.Tensor:
        """Vectors, one below the other."""
        out = torch.empty(len(names), columns, dtype=self.dtype, device=self.device)
        self.reads += [Read(name, row) for name, row in zip(names, out, strict=True)]
        return out

    def read(self, meter: ProgressMeter) -> None:
        read_all(self.checkpoint, self.reads, meter=meter)


def fp8_parameters(checkpoint: Checkpoint) -> int:
    """How many of the attention tier's weights stay fp8 with `keep_fp8`."""
    found = (name for name in checkpoint.names if ".mlp.experts." not in name and name.endswith("_proj.weight"))
    shapes = [checkpoint.shape(name) for name in found if quantized_form(checkpoint, name[: -len(".weight")]) == "fp8"]
    return sum(rows * columns for rows, columns in shapes if takes(rows, columns))


def _bytes_on_disk(checkpoint: Checkpoint) -> int:
    tied = checkpoint.config.tie_word_embeddings
    return sum(
        checkpoint.entry(name).num_bytes
        for name in checkpoint.names
        if ".mlp.experts." not in name and not (tied and name == "lm_head.weight")
    )
