"""From the qkv product to mixed heads in one launch, for decodes in contexts that are not long.

Why: there a layer's norms, rotation, KV write and attention are mostly latency. In one launch the pages of earlier
positions are read while the qkv product still runs, and the output product may read its weights while attention runs,
since nothing here keeps the next kernel from starting. FlashInfer's kernels (`paged_attention.py`) take over where
reading KV is the work. Idea: FlashDecoding's split of the sequence, added up over distributed shared memory."""

import functools
from typing import NamedTuple

import numpy as np
import torch

from .checks import require, require_sizes
from .jit import Kernel
from .qk_norm_rope import KV_DTYPES

BF16 = torch.bfloat16
HEAD_SIZES = (64, 128)
MOST_GROUP = 16  # heads a KV head
# Clusters at most; a `Share` of bf16 KV.
_SHARES = ((8, 8, 4, 4), (16, 4, 8, 2), (32, 2, 8, 2), (128, 2, 4, 2), (1 << 31, 1, 4, 2))


class Share(NamedTuple):
    """How a request's work is shared."""

    ctas: int
    warps: int
    stages: int  # units of 16 positions that a warp has on their way


def share_for(num_tokens: int, num_kv_heads: int, kv_bytes: int = 2) -> Share:
    """Measured on an H200 (docs/performance.md, "From q, k, v to mixed heads"). Up to 64 CTAs in all have a
    multiprocessor each and leave half of them to the products around; rings of 128 KiB keep two from sharing one while
    others idle. Where that would be less than two CTAs a cluster, rings are half as long and two or three CTAs fit.
    About as many clusters as multiprocessors and more are one CTA each."""
    clusters = num_kv_heads * num_tokens
    ctas, warps, stages = next(sizes for most, *sizes in _SHARES if clusters <= most)
    return Share(ctas, warps, stages * 2 // kv_bytes)


def decode_attention(
    qkv: torch.Tensor,
    qk_norm: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_lens: torch.Tensor,
    page_starts: torch.Tensor,
    pages: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    share: Share | None = None,
) -> torch.Tensor:
    """qkv [T, (num_heads + 2 * num_kv_heads) * D] bf16 -> [T, num_heads, D] bf16, one new token for each of T requests.

    As `qk_norm_rope`, whose arguments come first, and attention over what is then in the cache: kv_lens [T] int32
    positions with the new one, page_starts [T] int32 where a request's block ids begin in `pages` int32. All but qkv
    and the slots to be written must be as they are before the kernel that makes qkv begins. Tokens with slot -1 are
    padding: zeros, and nothing is written. k_cache and v_cache [num_blocks, block_size, num_kv_heads, D], both bf16 or
    both e4m3. `share`: None for the one that was measured best."""
    head_dim, num_tokens = qk_norm.shape[1], qkv.shape[0]
    require_sizes(
        takes(num_heads, num_kv_heads, head_dim, qkv.device),
        f"decode_attention takes a GPU of capability 9.0, head sizes {HEAD_SIZES} and up to {MOST_GROUP} heads a KV "
        f"head, got {head_dim} and {num_heads} on {num_kv_heads}: use qk_norm_rope and paged attention",
    )
    require("qkv", qkv, BF16, (None, (num_heads + 2 * num_kv_heads) * head_dim))
    require("qk_norm", qk_norm, BF16, (num_heads + num_kv_heads, head_dim))
    require("cos_sin", cos_sin, torch.float32, (None, head_dim))
    require("positions", positions, torch.int64, (num_tokens,))
    require("slot_mapping", slot_mapping, torch.int64, (num_tokens,))
    kv_dtype = k_cache.dtype
    require_sizes(kv_dtype in KV_DTYPES, f"k_cache: {kv_dtype}; KV is bfloat16 or float8_e4m3fn")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        require(name, cache, kv_dtype, (None, None, num_kv_heads, head_dim))
    require_sizes(k_cache.shape == v_cache.shape, f"caches of {list(k_cache.shape)} and {list(v_cache.shape)}")
    require("kv_lens", kv_lens, torch.int32, (num_tokens,))
    require("page_starts", page_starts, torch.int32, (num_tokens,))
    require("pages", pages, torch.int32, (None,))
    shape = (num_tokens, num_heads, head_dim)
    out = torch.empty(shape, dtype=BF16, device=qkv.device) if out is None else require("out", out, BF16, shape)
    if num_tokens:
        scale = head_dim**-0.5 if scale is None else scale
        kv_bytes = kv_dtype.itemsize
        share = share or share_for(num_tokens, num_kv_heads, kv_bytes)
        decode_attention_kernel(num_heads, num_kv_heads, head_dim, k_cache.shape[1], share, kv_bytes).launch(
            (share.ctas * num_kv_heads, num_tokens),
            32 * share.warps,
            (
                *(qkv, qk_norm, np.float32(eps), cos_sin, positions, slot_mapping, k_cache, v_cache),
                *(kv_lens, page_starts, pages, np.float32(scale), out),
            ),
            device=qkv.device,
            shared_bytes=shared_bytes(num_heads // num_kv_heads, head_dim, share, kv_bytes),
        )
    return out


def takes(num_heads: int, num_kv_heads: int, head_dim: int, device: torch.device) -> bool:
    """Whether there is a kernel for these heads on this device."""
    fits = head_dim in HEAD_SIZES and num_heads % num_kv_heads == 0 and num_heads // num_kv_heads <= MOST_GROUP
    return fits and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def shared_bytes(group: int, head_dim: int, share: Share, kv_bytes: int) -> int:
    """As decode_attention.cu lays it out: rings, q, what warps and then CTAs add up, a barrier."""
    rows = (group + 7) // 8 * 8
    rings = share.warps * share.stages * 16 * 2 * head_dim * kv_bytes
    return rings + rows * head_dim * 2 + share.warps * rows * 8 + group * head_dim * 4 + share.ctas * rows * 8 + 16


@functools.cache
def decode_attention_kernel(
    num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, share: Share, kv_bytes: int = 2
) -> Kernel:
    defines = {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "PAGE": block_size,
        "CTAS": share.ctas,
        "WARPS": share.warps,
        "STAGES": share.stages,
        "SHARED": shared_bytes(num_heads // num_kv_heads, head_dim, share, kv_bytes),
        "KV_FP8": int(kv_bytes == 1),
    }
    return Kernel("decode_attention.cu", "decode_attention", defines)
