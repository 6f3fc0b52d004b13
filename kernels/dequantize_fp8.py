"""fp8 weights written out in bf16, for the library's products: many rows, on GPUs that
`dense_w8a8.py` has no kernel for."""

import functools

import torch

from .dense_fp8 import BF16, Fp8Weight
from .jit import Kernel


def dequantize_fp8(w: Fp8Weight) -> torch.Tensor:
    """[N, K] bf16, each value rounded once."""
    out = torch.empty(*w.shape, dtype=BF16, device=w.device)
    dequantize_fp8_kernel(w.shape[1]).launch((w.scales.numel(),), 256, (w.packed, w.scales, out), device=w.device)
    return out


@functools.cache
def dequantize_fp8_kernel(k: int) -> Kernel:
    return Kernel("dequantize_fp8.cu", "dequantize_fp8", {"K": k})
