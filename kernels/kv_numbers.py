"""Numbers that KV is kept in, in plain torch: the model's own, bf16, or e4m3 without a scale.

e4m3 is rounded to nearest even and saturates at 448, as the GPU's instruction does it; NaN stays NaN. Keys are normed
before they are written and values are of the order of 1, so the scale is 1: none of the official checkpoints names
another. What is read back is widened exactly, so attention over e4m3 is attention over other, rounder K and V, and all
that holds of it (chunks, prefixes, company) holds as it did. torch moves no e4m3 by index on a CPU, hence `as_moved`;
and it widens it there six times more slowly than a table of 256 numbers does."""

import functools

import torch

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


def to_kv(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x as KV of `dtype` has it."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3) if dtype == E4M3 else x.to(dtype)


def from_kv(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`stored`, or its bytes, as numbers to compute with."""
    if stored.dtype == E4M3:
        stored = stored.view(torch.uint8)
    if stored.dtype != torch.uint8:
        return stored.to(dtype)
    table = _numbers(dtype, stored.device)
    return table.index_select(0, stored.reshape(-1).int()).view(stored.shape)


def as_moved(stored: torch.Tensor) -> torch.Tensor:
    """The same memory, with a type that can be gathered and scattered."""
    return stored.view(torch.uint8) if stored.dtype == E4M3 else stored


@functools.cache
def _numbers(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[256] what each byte stands for."""
    return torch.arange(256, dtype=torch.uint8).view(E4M3).to(dtype).to(device)
