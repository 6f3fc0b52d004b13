"""The operations of the attention tier's kernels in plain torch: what they must compute. Runs on CPU and GPU.

Written for clarity, with the roundings of the plain model (`cluster/attention/model.py`), against which
`tests/test_attention_kernels_cpu.py` holds them."""

import torch
import torch.nn.functional as F

from . import reference
from .checks import require_sizes
from .kv_numbers import as_moved, from_kv, to_kv


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Over the last dimension, float32 inside, rounded to x's dtype before the weight. x [..., H], weight [..., H]."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def add_rms_norm(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [T, H] -> (the new residual, its norm)."""
    total = residual if x is None else residual + x
    return total, rms_norm(total, weight, eps)


def combine_add_rms_norm(
    y: torch.Tensor,
    topk_weights: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [T, k, H], topk_weights [T, k] -> (the new residual, its norm), the weighted sum rounded to y's dtype first."""
    if ids is None:
        ids = torch.zeros(y.shape[:2], dtype=torch.int32, device=y.device)
    return add_rms_norm(reference.combine(y, ids, topk_weights).to(y.dtype), residual, weight, eps)


def qk_norm_rope(
    qkv: torch.Tensor,
    qk_norm: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
) -> torch.Tensor:
    """As the kernel: returns q [T, num_heads, D], writes k and v."""
    head_dim = qk_norm.shape[1]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    normed = rms_norm(heads[:, : num_heads + num_kv_heads], qk_norm, eps).float()
    cos, sin = (half[:, None] for half in cos_sin[positions].chunk(2, dim=-1))  # [T, 1, D / 2]
    first, second = normed.chunk(2, dim=-1)
    turned = torch.cat([first * cos + second * -sin, second * cos + first * sin], dim=-1).to(qkv.dtype)
    written = slot_mapping >= 0
    for cache, values in ((k_cache, turned[:, num_heads:]), (v_cache, heads[:, num_heads + num_kv_heads :])):
        rows = as_moved(to_kv(values[written], cache.dtype))
        as_moved(cache).view(-1, num_kv_heads, head_dim)[slot_mapping[written]] = rows
    return turned[:, :num_heads]


def widen_kv(
    k_cache: torch.Tensor, v_cache: torch.Tensor, pages: torch.Tensor, out_k: torch.Tensor, out_v: torch.Tensor
) -> None:
    """As the kernel: the first pages of out_k and out_v become the named ones of the caches."""
    for cache, out in ((k_cache, out_k), (v_cache, out_v)):
        out[: len(pages)] = from_kv(as_moved(cache)[pages.long()], out.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2 * I], gate first -> silu(gate) * up [T, I], silu rounded before the product."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def embed_rms_norm(
    table: torch.Tensor, token_ids: torch.Tensor, last_token: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """token_ids [T], below 0: the last token of slot -1 - id -> (rows of the table [T, H], their norm)."""
    require_sizes(token_ids.dtype == torch.int64, f"token_ids must be int64, got {token_ids.dtype}")
    ids = torch.where(token_ids >= 0, token_ids, last_token[(-1 - token_ids).clamp(min=0)])
    rows = table[ids]
    return rows, rms_norm(rows, weight, eps)
