"""x @ w^T of fp8 checkpoints' dense layers for many rows: rows are quantised too, a scale for each 128 columns.

Why: from some hundred rows on the time is arithmetic, and fp8 is twice as fast as bf16. It is the form in which these
checkpoints are meant to be multiplied ("activation_scheme": "dynamic"); what it adds is a relative error of some 3 % of
noise a product, as in the experts. How the work is cut depends on the number of rows, and so do the last bits."""

import functools

import numpy as np
import torch

from .checks import require, require_sizes
from .dense_fp8 import BF16, BLOCK, Fp8Weight
from .jit import Kernel, num_sms

TILES = (128, 192)


def dense_w8a8(
    x: torch.Tensor, w: Fp8Weight, *, out: torch.Tensor | None = None, tile: int | None = None
) -> torch.Tensor:
    """x [M, K] bf16, w [N, K] -> [M, N] bf16. `tile`: rows of a CTA's tile, one of `TILES`."""
    num_rows, (num_outputs, k) = x.shape[0], w.shape
    require_sizes(has_kernel(x.device), "dense_w8a8 needs a GPU of capability 9.0: use dense_fp8 or dequantize_fp8")
    require("x", x, BF16, (None, k))
    if out is None:
        out = torch.empty(num_rows, num_outputs, dtype=BF16, device=x.device)
    require("out", out, BF16, (num_rows, num_outputs))
    if not num_rows:
        return out
    tile = tile or tile_for(num_rows)
    packed, scales = quantize_rows(x, -(-num_rows // tile) * tile)
    num_ctas = num_sms(x.device.index or 0)
    partial = torch.empty(2 * num_ctas * tile * BLOCK, dtype=torch.float32, device=x.device)
    dense_w8a8_kernel(k, tile).launch(
        (num_ctas,),
        2 * tile + 128,
        (
            w.packed,
            w.scales,
            packed,
            scales,
            np.int64(packed.shape[1]),
            np.int32(num_rows),
            out,
            np.int32(num_outputs),
            partial,
            w.counters,
        ),
        device=x.device,
        shared_bytes=shared_bytes(tile),
    )
    return out


def quantize_rows(x: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] bf16 -> e4m3 as uint8 [K / 128, capacity, 128], 16-byte pieces swizzled by row, and float32 scales
    [K / 128, capacity]; rows from M on hold whatever was in memory."""
    num_rows, k = x.shape
    packed = torch.empty(k // BLOCK, capacity, BLOCK, dtype=torch.uint8, device=x.device)
    scales = torch.empty(k // BLOCK, capacity, dtype=torch.float32, device=x.device)
    warps = num_rows * -(-k // 256)
    quantize_rows_kernel(k).launch(
        (-(-warps // 8),), 256, (x, np.int32(num_rows), np.int64(capacity), packed, scales), device=x.device
    )
    return packed, scales


def tile_for(num_rows: int) -> int:
    """The one with fewer rows, padding included, where the smaller one's cost a quarter more: it reads more for each.
    Measured on one H200, N 9216, K 4096, us by 128 and by 192: 37.9, 42.4 at 256 rows, 58.7, 54.3 at 512, 214, 167 at
    2048."""
    return min(TILES, key=lambda tile: -(-num_rows // tile) * tile * (1.25 if tile == 128 else 1.0))


def stages_for(tile: int) -> int:
    return 6 if tile == 128 else 5


def shared_bytes(tile: int) -> int:
    return stages_for(tile) * ((BLOCK + tile) * BLOCK + 4 * tile)


@functools.cache
def has_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def dense_w8a8_kernel(k: int, tile: int) -> Kernel:
    return Kernel("dense_w8a8.cu", "dense_w8a8", {"K": k, "TILE": tile, "STAGES": stages_for(tile)})


@functools.cache
def quantize_rows_kernel(k: int) -> Kernel:
    return Kernel("quantize_rows.cu", "quantize_rows", {"K": k})
