"""Everything between the qkv product and attention in one launch: norms of the q and k heads, rotary embedding, and the
write of k and v into the paged cache. In plain torch these are about fifteen launches a layer."""

import functools
from typing import NamedTuple

import numpy as np
import torch

from .checks import require, require_sizes
from .jit import Kernel

BF16 = torch.bfloat16
KV_DTYPES = (torch.bfloat16, torch.float8_e4m3fn)
MANY_TOKENS = 128  # from here on a group of lanes takes four heads: fewer reads of cos and sin for the same bits


class Projected(NamedTuple):
    """A layer's queries, keys and values as their product leaves them, with what they need to become heads."""

    qkv: torch.Tensor
    qk_norm: torch.Tensor
    eps: float
    cos_sin: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor


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
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """qkv [T, (num_heads + 2 * num_kv_heads) * D] bf16 -> q [T, num_heads, D] bf16, normed and rotated.

    qk_norm [num_heads + num_kv_heads, D] bf16; cos_sin [P, D] float32: a position's cos (D / 2), then its sin (D / 2),
    both with the attention factor; positions [T] int64 < P; slot_mapping [T] int64, -1 = do not write; k_cache and
    v_cache [num_blocks, block_size, num_kv_heads, D], both bf16 or both e4m3 (saturating), written at those slots."""
    head_dim = qk_norm.shape[1]
    num_tokens = qkv.shape[0]
    require_sizes(head_dim in (16, 32, 64, 128, 256), f"head_dim must be 16, 32, 64, 128 or 256, got {head_dim}")
    require("qkv", qkv, BF16, (None, (num_heads + 2 * num_kv_heads) * head_dim))
    require("qk_norm", qk_norm, BF16, (num_heads + num_kv_heads, head_dim))
    require("cos_sin", cos_sin, torch.float32, (None, head_dim))
    require("positions", positions, torch.int64, (num_tokens,))
    require("slot_mapping", slot_mapping, torch.int64, (num_tokens,))
    kv_dtype = k_cache.dtype
    require_sizes(kv_dtype in KV_DTYPES, f"k_cache: {kv_dtype}; KV is bfloat16 or float8_e4m3fn")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        require(name, cache, kv_dtype, (None, None, num_kv_heads, head_dim))
    shape = (num_tokens, num_heads, head_dim)
    q = torch.empty(shape, dtype=BF16, device=qkv.device) if out is None else require("out", out, BF16, shape)
    if num_tokens:
        per_group = 4 if num_tokens >= MANY_TOKENS else 1
        span = 128 // (head_dim // 8) * per_group
        qk_norm_rope_kernel(num_heads, num_kv_heads, head_dim, per_group, kv_dtype != BF16).launch(
            (num_tokens, -(-(num_heads + 2 * num_kv_heads) // span)),
            128,
            (qkv, qk_norm, np.float32(eps), cos_sin, positions, slot_mapping, k_cache, v_cache, q),
            device=qkv.device,
        )
    return q


@functools.cache
def qk_norm_rope_kernel(
    num_heads: int, num_kv_heads: int, head_dim: int, per_group: int, kv_fp8: bool = False
) -> Kernel:
    defines = {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "PER_GROUP": per_group,
        "KV_FP8": int(kv_fp8),
    }
    return Kernel("qk_norm_rope.cu", "qk_norm_rope", defines)
