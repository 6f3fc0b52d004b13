"""x @ w^T of fp8 checkpoints' dense layers for few rows: weights stay e4m3 with their 128x128 scales, rows stay bf16.

Why: up to 64 rows the time is the reading of w, so half the bytes are half the time; widened in registers and scaled in
float32 the weights are exactly the checkpoint's, which bf16 made from them at load is not. The layout is that of the
experts' second product (`pack.py`): a block is 16 KiB of memory in a row, and wgmma can read it too
(`dense_w8a8.py`). A row's bits depend on that row and w alone."""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from .checks import require, require_sizes
from .jit import Kernel
from .pack import pack_w2, unpack_w2

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
BLOCK = 128
MAX_ROWS = 64
MOST_CTAS = 256  # multiprocessors of a GPU; as many tiles may be shared (`dense_w8a8.py`)
_TILES = (8, 16, 32, 64)
_SHARED_BYTES = {(8, 0): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}  # a CTA's most; else 99 KiB


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight:
    """A matrix [N, K] as the kernels read it."""

    packed: torch.Tensor  # uint8 [N / 128, K / 128, 16384], `pack.py`
    scales: torch.Tensor  # float32 [N / 128, K / 128]
    counters: torch.Tensor  # int32, zero between launches: how many CTAs have left their sums of a shared tile

    @property
    def shape(self) -> tuple[int, int]:
        return BLOCK * self.packed.shape[0], BLOCK * self.packed.shape[1]

    @property
    def device(self) -> torch.device:
        return self.packed.device


def pack_fp8(values: torch.Tensor, scales: torch.Tensor) -> Fp8Weight:
    """values [N, K] e4m3, scales [N / 128, K / 128] float32, contiguous, on any device. The memory of `values` becomes
    the weight's."""
    num_outputs, k = values.shape
    require_sizes(takes(num_outputs, k), f"fp8 products need N and K of multiples of 128, got N={num_outputs}, K={k}")
    expected = (num_outputs // BLOCK, k // BLOCK)
    require_sizes(
        (values.dtype, scales.dtype, tuple(scales.shape)) == (E4M3, torch.float32, expected),
        f"fp8 weights [{num_outputs}, {k}] are e4m3 with float32 scales {expected}, got {values.dtype}, {scales.dtype} "
        f"and {tuple(scales.shape)}",
    )
    storage = values.view(torch.uint8).view(num_outputs // BLOCK, k // BLOCK, BLOCK * BLOCK)
    storage.copy_(pack_w2(values[None])[0])
    counters = torch.zeros(max(num_outputs // BLOCK, MOST_CTAS), dtype=torch.int32, device=values.device)
    return Fp8Weight(storage, scales, counters)


def unpack_fp8(w: Fp8Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """The arguments of `pack_fp8`."""
    return unpack_w2(w.packed[None], E4M3)[0], w.scales


def takes(num_outputs: int, k: int) -> bool:
    """Whether there is a kernel for w [num_outputs, k]."""
    return num_outputs > 0 and k > 0 and num_outputs % BLOCK == 0 and k % BLOCK == 0


def dense_fp8(x: torch.Tensor, w: Fp8Weight, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K] bf16, w [N, K] -> [M, N] bf16. Up to `MAX_ROWS` rows are one launch; more are several."""
    num_rows, (num_outputs, k) = x.shape[0], w.shape
    require("x", x, BF16, (None, k))
    if out is None:
        out = torch.empty(num_rows, num_outputs, dtype=BF16, device=x.device)
    require("out", out, BF16, (num_rows, num_outputs))
    most = most_rows(_capability(x.device.index or 0))
    if num_rows <= most:
        _launch(x, w, out)
    else:
        for rows, result in zip(x.split(most), out.split(most), strict=True):
            _launch(rows, w, result)
    return out


def _launch(x: torch.Tensor, w: Fp8Weight, out: torch.Tensor) -> None:
    num_rows, (num_outputs, k) = x.shape[0], w.shape
    if not num_rows:
        return
    tile = next(tile for tile in _TILES if num_rows <= tile)
    stages = stages_for(tile, _capability(x.device.index or 0))
    num_ctas = min(num_sms(x.device.index or 0), w.scales.numel())
    partial = torch.empty(2 * num_ctas * BLOCK * tile, dtype=torch.float32, device=x.device)
    dense_fp8_kernel(k, tile, stages).launch(
        (num_ctas,),
        num_threads(tile),
        (w.packed, w.scales, x, np.int32(num_rows), out, np.int32(num_outputs), partial, w.counters),
        device=x.device,
        shared_bytes=shared_bytes(tile, stages),
    )


def num_threads(tile: int) -> int:
    return 32 * (2 * (8 if tile < 32 else 4) + 2)


def shared_bytes(tile: int, stages: int) -> int:
    """Dynamic shared memory: the ring and the exchange of partial sums."""
    return stages * (2 * BLOCK * BLOCK + tile * (2 * 2 * BLOCK + 32)) + (8 if tile < 32 else 4) * 64 * tile


def stages_for(tile: int, capability: tuple[int, int]) -> int:
    """As many slots as a multiprocessor's shared memory holds, 6 at most; less than 2: no such kernel there."""
    exchange = shared_bytes(tile, 0)
    room = _SHARED_BYTES.get(capability, 99 << 10) - 1024 - exchange
    return min(6, room // (shared_bytes(tile, 1) - exchange)) if tile <= 32 or capability[0] >= 9 else 0


def most_rows(capability: tuple[int, int]) -> int:
    """Of one launch."""
    return max(tile for tile in _TILES if stages_for(tile, capability) >= 2)


@functools.cache
def dense_fp8_kernel(k: int, tile: int, stages: int) -> Kernel:
    return Kernel("dense_fp8.cu", "dense_fp8", {"K": k, "TILE": tile, "STAGES": stages})


@functools.cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


@functools.cache
def num_sms(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count
