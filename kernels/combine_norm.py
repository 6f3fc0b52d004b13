"""The weighted sum of a token's expert rows, the residual sum and the next norm in one launch: the end of one layer and
the beginning of the next. Saves a launch a layer and the round trip of the sum through memory."""

import functools

import numpy as np
import torch

from .add_norm import norm_threads
from .checks import require, require_sizes
from .jit import Kernel, since_hopper

BF16 = torch.bfloat16
ROW_CTAS = 8  # of a cluster that shares a row: hidden 4096 takes 1.4 us where one CTA takes 2.1; 4 do no better
FEW_TOKENS = 8  # up to here rows are shared


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
        threads = norm_threads(hidden)
        shared = num_tokens <= FEW_TOKENS and hidden == 8 * threads and threads % (32 * ROW_CTAS) == 0
        ctas = ROW_CTAS if shared and since_hopper(y.device.index) else 1
        combine_norm_kernel(hidden, top_k, ctas).launch(
            (num_tokens * ctas,),
            threads // ctas,
            (y, ids, topk_weights, residual, weight, np.float32(eps), out),
            device=y.device,
        )
    return out


@functools.cache
def combine_norm_kernel(hidden: int, top_k: int, row_ctas: int = 1) -> Kernel:
    """`row_ctas` CTAs share a row, in a cluster."""
    defines = {"HIDDEN": hidden, "THREADS": norm_threads(hidden) // row_ctas, "TOP_K": top_k, "ROW_CTAS": row_ctas}
    return Kernel("combine_norm.cu", "combine_add_rms_norm", defines)
