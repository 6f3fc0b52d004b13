"""x @ w^T for few rows: the dense products of a decode step at batch 1 to 8, where reading w is all the work.

Why not the BLAS: its kernels for so few rows read w well below the rate of the memory, and none begins to read before
the kernel before it has ended, which at batch 1 is a third of the time. Here the first weights are on their way while
the norm or attention still runs. Tensor cores take up to 8 rows at one row's price. A row's bits depend on that row and
w alone."""

import functools

import numpy as np
import torch

from .checks import require, require_sizes
from .jit import Kernel, num_sms

BF16 = torch.bfloat16
MAX_ROWS = 8
MAX_K = 4096  # x is held in registers by 16 warps


def thin_linear(x: torch.Tensor, w: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K] bf16, M <= 8, w [N, K] bf16 -> [M, N] bf16."""
    num_rows, k = x.shape
    num_outputs = w.shape[0]
    require_sizes(
        num_rows <= MAX_ROWS and takes(num_outputs, k),
        f"thin_linear takes up to {MAX_ROWS} rows, K of a multiple of 32 from 64 to {MAX_K} and N of a multiple of 8, "
        f"got M={num_rows}, N={num_outputs}, K={k}",
    )
    require("x", x, BF16, (None, None))
    require("w", w, BF16, (None, k))
    if out is None:
        out = torch.empty(num_rows, num_outputs, dtype=BF16, device=x.device)
    require("out", out, BF16, (num_rows, num_outputs))
    if num_rows:
        warps = warps_for(k)
        num_ctas = num_sms(x.device.index or 0) * (1 if warps > 8 else 2)
        thin_linear_kernel(k).launch(
            (min(num_ctas, num_outputs // 8),),
            32 * warps,
            (x, np.int32(num_rows), w, np.int32(num_outputs), out),
            device=x.device,
        )
    return out


def takes(num_outputs: int, k: int) -> bool:
    """Whether there is a kernel for w [num_outputs, k]."""
    return k % 32 == 0 and 64 <= k <= MAX_K and num_outputs % 8 == 0 and num_outputs > 0


def warps_for(k: int) -> int:
    """So many that a warp holds its part of all rows, at most 256 columns, in registers."""
    return next(warps for warps in (2, 4, 8, 16) if k <= 256 * warps)


@functools.cache
def thin_linear_kernel(k: int) -> Kernel:
    return Kernel("thin_linear.cu", "thin_linear", {"K": k, "WARPS": warps_for(k)})
