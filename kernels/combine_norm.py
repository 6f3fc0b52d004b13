"""The weighted sum of a token's expert rows, the residual sum and the next norm in one launch: the end of one layer and
the beginning of the next. Saves a launch a layer and the round trip of the sum through memory."""

import functools

import numpy as np
import torch

from .add_norm import norm_threads
from .checks import require, require_sizes
from .jit import Kernel

BF16 = torch.bfloat16


def combine_add_rms_norm(
    y: torch.Tensor,
    topk_weights: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    ids: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [T, k, H] bf16, topk_weights [T, k] float32: residual [T, H] bf16 becomes residual + combine(y) in place, both
    sums rounded as `combine` and `add_rms_norm` do; returns its norm times weight [H], [T, H] bf16. Pairs whose `ids`
    [T, k] int32 are negative are skipped, whatever y holds there; None = all count."""
    num_tokens, top_k, hidden = y.shape
    require_sizes(0 < top_k <= 16, f"combine_add_rms_norm takes top_k up to 16, got {top_k}")
    require("y", y, BF16, (None, None, None))
    require("topk_weights", topk_weights, torch.float32, (num_tokens, top_k))
    require("residual", residual, BF16, (num_tokens, hidden))
    require("weight", weight, BF16, (hidden,))
    if ids is not None:
        require("ids", ids, torch.int32, (num_tokens, top_k))
    out = torch.empty_like(residual) if out is None else require("out", out, BF16, (num_tokens, hidden))
    if num_tokens:
        combine_norm_kernel(hidden, top_k).launch(
            (num_tokens,),
            norm_threads(hidden),
            (y, ids, topk_weights, residual, weight, np.float32(eps), out),
            device=y.device,
        )
    return out


@functools.cache
def combine_norm_kernel(hidden: int, top_k: int) -> Kernel:
    defines = {"HIDDEN": hidden, "THREADS": norm_threads(hidden), "TOP_K": top_k}
    return Kernel("combine_norm.cu", "combine_add_rms_norm", defines)
