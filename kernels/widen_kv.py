"""Pages of e4m3 KV as bf16, for a kernel that takes no other: FlashInfer's for long queries.

Its own fp8 form wants queries and weights in e4m3 too, a second rounding of everything; this one loses nothing and is a
fiftieth of the work beside it: a page is widened once for all queries and heads that read it."""

import functools

import torch

from .checks import require, require_sizes
from .jit import Kernel

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


def widen_kv(
    k_cache: torch.Tensor, v_cache: torch.Tensor, pages: torch.Tensor, out_k: torch.Tensor, out_v: torch.Tensor
) -> None:
    """k_cache, v_cache [num_blocks, block_size, num_kv_heads, D] e4m3; pages [n] int32, each below num_blocks; the
    first n pages of out_k and out_v [n or more, block_size, num_kv_heads, D] bf16 are written."""
    page, num_pages = tuple(k_cache.shape[1:]), pages.shape[0]
    require("pages", pages, torch.int32, (None,))
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        require(name, cache, E4M3, (None, *page))
    for name, out in (("out_k", out_k), ("out_v", out_v)):
        require(name, out, BF16, (None, *page))
        require_sizes(len(out) >= num_pages, f"{name} has {len(out)} pages, {num_pages} are to be written")
    size = k_cache[0].numel()
    require_sizes(size % 16 == 0, f"a page must have a multiple of 16 numbers, got {size}")
    if num_pages:
        widen_kv_kernel(size).launch(
            (num_pages, 2), 256, (k_cache, v_cache, pages, out_k, out_v), device=k_cache.device
        )


@functools.cache
def widen_kv_kernel(page: int) -> Kernel:
    return Kernel("widen_kv.cu", "widen_kv", {"PAGE": page})
