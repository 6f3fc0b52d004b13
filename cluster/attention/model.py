"""Qwen3-MoE and dense Qwen3, the attention tier: a straight line from token ids to logits.

Attention, norms, gate, dense MLPs, embedding and head are computed here; the experts are wherever `step.moe` sends
rows. In batch-invariant mode every value of a token depends on its own sequence alone (see `numerics.py`,
`attention.py`), so logits are the same bits for any batch, chunking or replica. Reference: transformers' Qwen3Moe
and Qwen3 models."""

from collections.abc import Callable, Sequence

import torch

from ...checkpoint import Checkpoint, ProgressCallback
from ...model_config import ModelConfig
from ...numerics import Numerics, rms_norm, select_numerics, silu_mul
from ...router.contracts import StepContext
from ...router.gate import top_k
from .attention import AttentionPlan, PagedAttention
from .batch import StepBatch
from .rope import RotaryTable, rotate
from .weights import AttentionWeights, LayerWeights, load_attention_weights

KVCache = Sequence[tuple[torch.Tensor, torch.Tensor]]  # per layer K, V [num_blocks, block_size, num_kv_heads, head_dim]
RoutingHook = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Model:
    """Immutable weights; all state is in the KV cache that `forward` is handed."""

    def __init__(
        self,
        config: ModelConfig,
        weights: AttentionWeights,
        numerics: Numerics,
        *,
        block_size: int = 16,
        kv_dtype: torch.dtype | None = None,  # None: that of the weights
    ) -> None:
        self.config, self.weights, self.numerics = config, weights, numerics
        self.device, self.dtype = weights.embed.device, weights.embed.dtype
        self.kv_dtype = kv_dtype or self.dtype
        self.attention = PagedAttention(config, numerics, block_size=block_size)
        self.rotary = RotaryTable(config.rope, config.head_dim, device=self.device)
        # Sees (layer_id, topk_ids, topk_weights), may replace them: parity runs inject the reference's routing.
        self.routing_hook: RoutingHook | None = None

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        block_size: int = 16,
        kv_dtype: torch.dtype | None = None,
        batch_invariant: bool = True,
        progress: ProgressCallback | None = None,
    ) -> "Model":
        weights = load_attention_weights(checkpoint, dtype=dtype, device=device, progress=progress)
        numerics = select_numerics(
            batch_invariant=batch_invariant,
            linear_shapes=linear_shapes(checkpoint.config),
            batched_shapes=PagedAttention.product_shapes(checkpoint.config),
            device=device,
        )
        return cls(checkpoint.config, weights, numerics, block_size=block_size, kv_dtype=kv_dtype)

    def new_kv_cache(self, num_blocks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Zeroed pages of every layer."""
        shape = (num_blocks, self.attention.block_size, self.config.num_kv_heads, self.config.head_dim)
        return [
            (
                torch.zeros(shape, dtype=self.kv_dtype, device=self.device),
                torch.zeros(shape, dtype=self.kv_dtype, device=self.device),
            )
            for _ in range(self.config.num_layers)
        ]

    @torch.inference_mode()
    def forward(self, batch: StepBatch, kv_cache: KVCache, step: StepContext) -> torch.Tensor:
        """Logits [S, vocab_size] float32 of `batch.logits_rows`."""
        eps = self.config.rms_norm_eps
        plan = self.attention.plan(batch)
        rotary = self.rotary.rows(batch.positions)
        x = self.weights.embed[batch.token_ids]  # [T, hidden]
        for layer_id, (layer, cache) in enumerate(zip(self.weights.layers, kv_cache)):
            x = x + self._attention(layer, rms_norm(x, layer.input_norm, eps), plan, rotary, cache)
            x = x + self._mlp(layer_id, layer, rms_norm(x, layer.post_norm, eps), step)
        x = rms_norm(x[batch.logits_rows], self.weights.norm, eps)
        return self.numerics.linear(x, self.weights.lm_head).float()

    def _attention(
        self,
        layer: LayerWeights,
        x: torch.Tensor,
        plan: AttentionPlan,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv = self.numerics.linear(x, layer.qkv).view(x.shape[0], heads + 2 * kv_heads, self.config.head_dim)
        qk = _head_norm(qkv[:, : heads + kv_heads], layer.qk_norm, self.config.rms_norm_eps)
        qk = rotate(qk, *rotary)  # [T, heads + kv_heads, head_dim]
        self.attention.write(plan, cache[0], qk[:, heads:])
        self.attention.write(plan, cache[1], qkv[:, heads + kv_heads :])
        mixed = self.attention.attend(plan, qk[:, :heads], *cache)
        return self.numerics.linear(mixed.reshape(x.shape[0], -1), layer.o)

    def _mlp(self, layer_id: int, layer: LayerWeights, x: torch.Tensor, step: StepContext) -> torch.Tensor:
        if layer.gate is None:
            assert layer.w13 is not None
            assert layer.w2 is not None
            return self.numerics.linear(silu_mul(self.numerics.linear(x, layer.w13)), layer.w2)
        logits = self.numerics.linear(x, layer.gate)
        topk_ids, topk_weights = top_k(logits, self.config.top_k, renormalize=self.config.norm_topk_prob)
        if self.routing_hook is not None:
            topk_ids, topk_weights = self.routing_hook(layer_id, topk_ids, topk_weights)
        return step.moe(layer_id, x, topk_ids, topk_weights)


def linear_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(K, N) of every plain product of the attention tier, for the self-test."""
    shapes = [
        (config.hidden_size, config.q_size + 2 * config.kv_size),
        (config.q_size, config.hidden_size),
        (config.hidden_size, config.vocab_size),
    ]
    if config.moe_layer_ids:
        shapes.append((config.hidden_size, config.num_experts))
    if len(config.moe_layer_ids) < config.num_layers:
        shapes += [
            (config.hidden_size, 2 * config.intermediate_size),
            (config.intermediate_size, config.hidden_size),
        ]
    return shapes


def _head_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of every head, x [T, heads, head_dim], with a weight per head [heads, head_dim]."""
    ones = weight.new_ones(weight.shape[-1])
    return rms_norm(x, ones, eps) * weight
