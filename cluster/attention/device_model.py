"""Qwen3-MoE and dense Qwen3 on a GPU, the attention tier: the straight line of `model.py` in few launches.

A layer is eleven launches: q, k, v product; norms, rotary embedding and KV write; attention; output product; residual
sum and norm; gate product; top-k; the experts' three (`step.rows`: route, pack, both products in one); weighted sum,
residual sum and the next layer's norm. For few tokens it is nine: the gate is one, route and pack are one; for few
decodes of short contexts eight, with all of attention behind the product in one (`Attend.whole`). Nothing syncs and
nothing is allocated outside torch's allocator, so a forward may stand in a CUDA graph. Rounding is the plain model's:
bf16 between operations, float32 inside them.

Rows from `num_valid` on are padding: they are routed nowhere and written nowhere; what they compute means nothing.
In batch-invariant mode products have more rows than tokens (`products.py`): kernels write the first T of them, and
products read them all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ...checkpoint import Checkpoint, ProgressCallback
from ...errors import ConfigError
from ...kernels.add_norm import add_rms_norm
from ...kernels.combine_norm import combine_add_rms_norm
from ...kernels.embed_norm import embed_rms_norm
from ...kernels.gate_linear import gate_linear
from ...kernels.gate_linear import takes as takes_gate
from ...kernels.gate_topk import gate_topk
from ...kernels.qk_norm_rope import Projected, qk_norm_rope
from ...kernels.silu_mul import silu_mul
from ...model_config import ModelConfig
from .products import InvariantProducts, PlainProducts, Products, Weight
from .rope import inverse_frequencies
from .weights import AttentionWeights, LayerWeights, load_attention_weights

_FUSED_GATE_TOKENS = 32  # above, two launches that fill the GPU are faster than one that does not

KVPages = Sequence[tuple[torch.Tensor, torch.Tensor]]  # per layer K, V [num_blocks, block_size, num_kv_heads, head_dim]


class Rows(Protocol):
    """What a step gives a model: the unweighted rows of a layer's experts (`router/device_step.py`)."""

    def rows(self, layer_id: int, x: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor: ...


class Attend(Protocol):
    """Planned attention (`flash.py`)."""

    @property
    def whole(self) -> Callable[..., torch.Tensor] | None:
        """What turns a layer's `Projected`, k_cache, v_cache and `out` into mixed heads and writes the new K and V, in
        the step that is planned. None: `attend` does, from queries, with K and V written."""

    def attend(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBatch:
    """`T` tokens on the device. Ids below 0 are the last token of slot -1 - id (`device_sampler.py`)."""

    token_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slot_mapping: torch.Tensor  # [T] int64, -1 = do not write
    num_valid: torch.Tensor | None = None  # [1] int32; None = all
    logits_rows: torch.Tensor | None = None  # [S] int64; None = all


class DeviceModel:
    """Immutable weights; all state is in the KV pages that `forward` is handed."""

    def __init__(
        self,
        config: ModelConfig,
        weights: AttentionWeights,
        *,
        max_model_len: int,
        block_size: int,
        kv_dtype: torch.dtype = torch.bfloat16,
        products: Products | None = None,
    ) -> None:
        if weights.embed.dtype != torch.bfloat16:
            raise ConfigError("dtype", str(weights.embed.dtype), "bfloat16: the GPU engine's kernels take no other")
        self.config, self.weights, self.block_size, self.kv_dtype = config, weights, block_size, kv_dtype
        self.device, self.products = weights.embed.device, products or PlainProducts()
        fused = isinstance(self.products, PlainProducts) and _has_fused_gate(config, self.device)
        self._most_gate_tokens = _FUSED_GATE_TOKENS if fused else 0
        self.cos_sin = rotary_table(config, max_model_len).to(self.device)  # [max_model_len, head_dim] float32

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        device: torch.device | str,
        max_model_len: int,
        block_size: int,
        kv_dtype: torch.dtype = torch.bfloat16,
        batch_invariant: bool = False,
        progress: ProgressCallback | None = None,
    ) -> "DeviceModel":
        on_gpu = torch.device(device).type == "cuda"  # where there are kernels for fp8
        weights = load_attention_weights(
            checkpoint, dtype=torch.bfloat16, device=device, keep_fp8=on_gpu, progress=progress
        )
        products = InvariantProducts(_one_of_each_shape(weights)) if batch_invariant else PlainProducts()
        return cls(
            checkpoint.config,
            weights,
            max_model_len=max_model_len,
            block_size=block_size,
            kv_dtype=kv_dtype,
            products=products,
        )

    def new_kv_cache(self, num_blocks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pages of every layer, zeroed: a masked slot must hold a number."""
        shape = (num_blocks, self.block_size, self.config.num_kv_heads, self.config.head_dim)
        return [
            (
                torch.zeros(shape, dtype=self.kv_dtype, device=self.device),
                torch.zeros(shape, dtype=self.kv_dtype, device=self.device),
            )
            for _ in range(self.config.num_layers)
        ]

    @torch.inference_mode()
    def forward(
        self,
        batch: DeviceBatch,
        kv_pages: KVPages,
        step: Rows,
        attention: Attend,
        *,
        last_token: torch.Tensor | None = None,  # [num_slots] int64
    ) -> torch.Tensor:
        """Logits [S, vocab_size] bf16 of `batch.logits_rows`."""
        line = self.line(batch, kv_pages, step, last_token=last_token)
        whole = attention.whole
        for layer_id, cache in enumerate(kv_pages):
            line.run(layer_id, project_only=whole is not None)
            if whole is not None:
                whole(line.projected, *cache, out=line.mixed_heads)
            else:
                attention.attend(line.q, *cache, out=line.mixed_heads)
        line.run(self.config.num_layers)
        return self.logits(line.x, batch.logits_rows, batch.token_ids.shape[0])

    def line(
        self,
        batch: DeviceBatch,
        kv_pages: KVPages,
        step: Rows,
        *,
        last_token: torch.Tensor | None = None,
        rooms: "AttentionRooms | None" = None,
    ) -> "Line":
        """A forward in pieces. `rooms`: where attention's queries and results lie, for those who need to know."""
        rooms = rooms or AttentionRooms.of(self, batch.token_ids.shape[0])
        return Line(self, batch, kv_pages, step, last_token, rooms)

    @torch.inference_mode()
    def logits(self, x: torch.Tensor, rows: torch.Tensor | None, num_tokens: int) -> torch.Tensor:
        """x [padded(T), hidden] of the last norm -> [S, vocab_size] bf16 of these rows, None = all."""
        if rows is None:
            return _first(self.products(x, self.weights.lm_head), num_tokens)
        num_rows = rows.shape[0]
        chosen = self.room(num_rows, self.config.hidden_size)
        torch.index_select(x, 0, rows, out=chosen[:num_rows])
        return _first(self.products(chosen, self.weights.lm_head), num_rows)

    def mlp(
        self,
        layer_id: int,
        layer: LayerWeights,
        x: torch.Tensor,
        batch: DeviceBatch,
        residual: torch.Tensor,
        after: torch.Tensor,
        step: Rows,
    ) -> torch.Tensor:
        """Experts or dense MLP, added to the residual -> the norm that follows, [padded(T), hidden]."""
        config, num_tokens, product = self.config, residual.shape[0], self.products
        out = self.room(num_tokens, config.hidden_size)
        if layer.gate is None:
            assert layer.w13 is not None
            assert layer.w2 is not None
            hidden = self.room(num_tokens, layer.w2.shape[1])
            silu_mul(_first(product(x, layer.w13), num_tokens), out=_first(hidden, num_tokens))
            y = _first(product(hidden, layer.w2), num_tokens)
            add_rms_norm(y, residual, after, config.rms_norm_eps, out=_first(out, num_tokens))
            return out
        topk_ids, topk_weights = self.route(layer.gate, x, batch)
        rows = step.rows(layer_id, _first(x, num_tokens), topk_ids)  # [T, top_k, hidden]
        combine_add_rms_norm(
            rows, topk_weights, residual, after, config.rms_norm_eps, ids=topk_ids, out=_first(out, num_tokens)
        )
        return out

    def route(self, gate: torch.Tensor, x: torch.Tensor, batch: DeviceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """topk_ids int32, topk_weights float32, [T, top_k]; -1 for padding."""
        top_k, num_tokens = self.config.top_k, batch.token_ids.shape[0]
        renormalize = self.config.norm_topk_prob
        if num_tokens <= self._most_gate_tokens:
            rows = None if batch.num_valid is None else batch.slot_mapping
            return gate_linear(x, gate, top_k, renormalize=renormalize, rows=rows)
        logits = _first(self.products(x, gate), num_tokens)
        return gate_topk(logits, top_k, renormalize=renormalize, num_valid=batch.num_valid)

    def room(self, num_tokens: int, width: int) -> torch.Tensor:
        """[padded(T), width] for what a product reads; rows from T on hold whatever was in memory."""
        return torch.empty(self.products.padded(num_tokens), width, dtype=torch.bfloat16, device=self.device)


@dataclass(frozen=True, slots=True)
class AttentionRooms:
    """What attention reads and writes, the same for every layer."""

    q: torch.Tensor  # [T, num_heads, head_dim]
    mixed: torch.Tensor  # [padded(T), num_heads * head_dim]

    @classmethod
    def of(cls, model: DeviceModel, num_tokens: int) -> "AttentionRooms":
        config = model.config
        q = torch.empty(num_tokens, config.num_heads, config.head_dim, dtype=torch.bfloat16, device=model.device)
        return cls(q, model.room(num_tokens, config.q_size))


class Line:
    """One forward in pieces, between which attention stands: embedding to the first queries, from each layer's
    attention to the next one's queries, and from the last attention to the last norm. Pieces run in order."""

    def __init__(
        self,
        model: DeviceModel,
        batch: DeviceBatch,
        kv_pages: KVPages,
        step: Rows,
        last_token: torch.Tensor | None,
        rooms: AttentionRooms,
    ) -> None:
        self._model, self._batch, self._kv_pages = model, batch, kv_pages
        self._step, self._last_token = step, last_token
        self.q, self._mixed = rooms.q, rooms.mixed
        self._num_tokens = rooms.q.shape[0]
        self.mixed_heads = _first(rooms.mixed, self._num_tokens).view(rooms.q.shape)
        self.projected: Projected  # of the piece that has run
        self._residual: torch.Tensor  # [T, hidden]
        self.x: torch.Tensor  # [padded(T), hidden], the norm that a product reads; after the last piece the last one

    @torch.inference_mode()
    def run(self, piece: int, *, project_only: bool = False) -> None:
        """`piece` 0 to num_layers; all but the last leave a layer's queries in `q` and its keys and values in KV, or,
        `project_only`, all three in `projected`."""
        layers = self._model.weights.layers
        if piece:
            self._after_attention(piece - 1)
        else:
            self._embed()
        if piece < len(layers):
            self._project(layers[piece])
            if not project_only:
                self._turn(self._kv_pages[piece])

    def _embed(self) -> None:
        model, token_ids = self._model, self._batch.token_ids
        self._residual, self.x = embed_rms_norm(
            model.weights.embed,
            token_ids,
            model.weights.layers[0].input_norm,
            model.config.rms_norm_eps,
            last_token=self._last_token,
        )
        num_tokens = token_ids.shape[0]
        if model.products.padded(num_tokens) != num_tokens:
            first, self.x = self.x, model.room(num_tokens, model.config.hidden_size)
            self.x[:num_tokens] = first

    def _project(self, layer: LayerWeights) -> None:
        model, batch = self._model, self._batch
        qkv = _first(model.products(self.x, layer.qkv), self._num_tokens)
        eps, where = model.config.rms_norm_eps, (batch.positions, batch.slot_mapping)
        self.projected = Projected(qkv, layer.qk_norm, eps, model.cos_sin, *where)

    def _turn(self, cache: tuple[torch.Tensor, torch.Tensor]) -> None:
        num_heads, num_kv_heads = self._model.config.num_heads, self._model.config.num_kv_heads
        qk_norm_rope(*self.projected, *cache, num_heads=num_heads, num_kv_heads=num_kv_heads, out=self.q)

    def _after_attention(self, layer_id: int) -> None:
        model, weights = self._model, self._model.weights
        layer, num_tokens = weights.layers[layer_id], self._num_tokens
        x = model.room(num_tokens, model.config.hidden_size)
        y = _first(model.products(self._mixed, layer.o), num_tokens)
        add_rms_norm(y, self._residual, layer.post_norm, model.config.rms_norm_eps, out=_first(x, num_tokens))
        is_last = layer_id + 1 == len(weights.layers)
        after = weights.norm if is_last else weights.layers[layer_id + 1].input_norm
        self.x = model.mlp(layer_id, layer, x, self._batch, self._residual, after, self._step)


def _first(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """x[:num_rows]; where that is all of it without the host's time for a view."""
    return x if x.shape[0] == num_rows else x[:num_rows]


def _has_fused_gate(config: ModelConfig, device: torch.device) -> bool:
    return device.type == "cuda" and takes_gate(config.num_experts, config.hidden_size, config.top_k, device)


def _one_of_each_shape(weights: AttentionWeights) -> list[Weight]:
    """A weight of every shape that products are made with."""
    found: dict[tuple[int, ...], Weight] = {weights.lm_head.shape: weights.lm_head}
    for layer in weights.layers:
        for w in (layer.qkv, layer.o, layer.gate, layer.w13, layer.w2):
            if w is not None:
                found.setdefault(w.shape, w)
    return list(found.values())


def rotary_table(config: ModelConfig, num_positions: int) -> torch.Tensor:
    """[num_positions, head_dim] float32: a position's cos, then its sin, both with YaRN's factor."""
    frequencies, factor = inverse_frequencies(config.rope, config.head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return torch.cat([angles.cos() * factor, angles.sin() * factor], dim=-1)
