"""silu(gate) * up of a dense layer's product, in one pass; the experts' own is inside the grouped GEMM."""

import functools

import numpy as np
import torch

from .checks import require, require_sizes
from .jit import Kernel

BF16 = torch.bfloat16


def silu_mul(gate_up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """gate_up [T, 2 * I] bf16, gate first -> [T, I] bf16; silu is rounded to bf16 before the product, as in the plain
    model."""
    require("gate_up", gate_up, BF16, (None, None))
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    require_sizes(
        gate_up.shape[1] % 16 == 0 and width > 0, f"silu_mul takes widths of a multiple of 8, got {gate_up.shape[1]}"
    )
    if out is None:
        out = torch.empty(num_tokens, width, dtype=BF16, device=gate_up.device)
    require("out", out, BF16, (num_tokens, width))
    if num_tokens:
        silu_mul_kernel().launch(
            (-(-num_tokens * (width // 8) // 256),),
            256,
            (gate_up, np.int64(num_tokens), np.int32(width), out),
            device=gate_up.device,
        )
    return out


@functools.cache
def silu_mul_kernel() -> Kernel:
    return Kernel("silu_mul.cu", "silu_mul")
