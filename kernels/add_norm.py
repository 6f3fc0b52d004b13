"""Residual sum and RMSNorm in one launch: what stands between any two blocks of the model.

Why fused: alone they read and write the residual twice and cost two to seven launches. Rounding is the plain model's:
the sum to bf16, its norm to bf16, the product with the weight to bf16, so hidden states agree with it bit for bit but
for the order of one float32 sum, which is fixed here for every row."""

import functools

import numpy as np
import torch

from .checks import require, require_sizes
from .jit import Kernel

BF16 = torch.bfloat16


def add_rms_norm(
    x: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual [T, H] bf16 becomes bf16(residual + x) in place (x [T, H] bf16, or None: it stays as it is); returns its
    norm times weight [H] bf16, [T, H] bf16. `out` may be x."""
    num_tokens, hidden = residual.shape
    require("residual", residual, BF16, (None, None))
    require("weight", weight, BF16, (hidden,))
    if x is not None:
        require("x", x, BF16, residual.shape)
    out = torch.empty_like(residual) if out is None else require("out", out, BF16, residual.shape)
    if num_tokens:
        add_norm_kernel(hidden).launch(
            (num_tokens,),
            norm_threads(hidden),
            (x, residual, weight, np.float32(eps), out),
            device=residual.device,
        )
    return out


def norm_threads(hidden: int) -> int:
    """A thread for every 8 columns, up to 1024."""
    require_sizes(
        hidden % 8 == 0 and 0 < hidden <= 32768, f"hidden must be a multiple of 8, at most 32768, got {hidden}"
    )
    return min(1024, -(-hidden // 256) * 32)


@functools.cache
def add_norm_kernel(hidden: int) -> Kernel:
    return Kernel("add_norm.cu", "add_rms_norm", {"HIDDEN": hidden, "THREADS": norm_threads(hidden)})
