"""x @ w^T of fp8 checkpoints' dense layers for few rows: weights stay e4m3 with their 128x128 scales, rows stay bf16.

Why: up to 16 rows the time is the reading of w, so half the bytes are half the time; widened in registers and scaled in
float32 the weights are exactly the checkpoint's, which bf16 made from them at load is not. The layout is that of the
experts' second product (`pack.py`): rows of a block lie together, and wgmma can read them too (`dense_w8a8.py`). A
row's bits depend on that row and w alone."""

import functools
from dataclasses import dataclass, replace

import numpy as np
import torch

from .checks import require, require_sizes
from .jit import Kernel, num_sms
from .pack import pack_w2, unpack_w2

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
BLOCK = 128
MAX_ROWS = 16  # of one launch
MOST_CTAS = 256  # multiprocessors of a GPU; as many tiles may be shared (`dense_w8a8.py`)
_MOST_WARPS = 20  # that multiply
_SHARED_BYTES = {(8, 0): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}  # a CTA's most; else 99 KiB


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight:
    """A matrix [N, K] as the kernels read it."""

    packed: torch.Tensor  # uint8 [N / 128, K / 128, 16384], `pack.py`
    scales: torch.Tensor  # float32 [N / 128, K / 128]
    counters: (
        torch.Tensor
    )  # int32 [MOST_CTAS], zero between launches: how many CTAs have left their sums of a shared tile

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
    return Fp8Weight(storage, scales, torch.zeros(MOST_CTAS, dtype=torch.int32, device=values.device))


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
    if num_rows <= MAX_ROWS:
        _launch(x, w, out)
    else:
        for rows, result in zip(x.split(MAX_ROWS), out.split(MAX_ROWS), strict=True):
            _launch(rows, w, result)
    return out


def _launch(x: torch.Tensor, w: Fp8Weight, out: torch.Tensor) -> None:
    num_rows, (num_outputs, k) = x.shape[0], w.shape
    if not num_rows:
        return
    index = x.device.index or 0
    num_ctas = num_slices(num_outputs, num_sms(index))
    plan = FewRowsPlan.choose(num_rows, outputs_of_slice(num_outputs, num_ctas), k, capability(index))
    dense_fp8_kernel(k, plan).launch(
        (num_ctas,),
        plan.num_threads,
        (w.packed, w.scales, x, np.int32(num_rows), out, np.int32(num_outputs)),
        device=x.device,
        shared_bytes=plan.shared_bytes,
    )


def num_slices(num_outputs: int, num_sms: int) -> int:
    """CTAs that share the outputs, in eights and at most 128 of them each: one for each multiprocessor, or a whole
    number of times as many."""
    eights = num_outputs // 8
    return min(eights, num_sms * -(-eights // (16 * num_sms)))


def outputs_of_slice(num_outputs: int, num_ctas: int) -> int:
    """The most that a CTA has."""
    return 8 * -(-num_outputs // (8 * num_ctas))


@dataclass(frozen=True, slots=True, kw_only=True)
class FewRowsPlan:
    """How `dense_fp8.cu` is compiled. Speed, and the order in which an output's parts are added."""

    tile: int  # rows: 8 or 16
    outputs: int  # of a CTA, at most
    parts: int  # k-blocks that are multiplied at the same time
    stages: int

    @classmethod
    @functools.cache
    def choose(cls, num_rows: int, outputs: int, k: int, capability: tuple[int, int]) -> "FewRowsPlan":
        """As many parts as there are warps, k-blocks and, at 16 rows, two slots for, so that a row's bits do not depend
        on the number of rows; as many slots (6 at most) as the shared memory holds."""
        room = _SHARED_BYTES.get(capability, 99 << 10) - 1024
        for parts in (8, 4, 2, 1):
            plan = cls(tile=MAX_ROWS, outputs=outputs, parts=parts, stages=1)
            fits = k % (BLOCK * parts) == 0 and parts * plan.m_warps <= _MOST_WARPS
            if fits and room // plan.shared_bytes >= 2:
                break
        plan = replace(plan, tile=8 if num_rows <= 8 else 16)
        return replace(plan, stages=min(6, room // plan.shared_bytes))

    @property
    def m_warps(self) -> int:
        return -(-self.outputs // 16)

    @property
    def num_threads(self) -> int:
        return 32 * (self.parts * self.m_warps + 2)

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.parts * self.outputs * BLOCK + self.tile * (self.parts * 2 * BLOCK + 32))

    @property
    def defines(self) -> dict[str, int]:
        return {"TILE": self.tile, "OUTPUTS": self.outputs, "PARTS": self.parts, "STAGES": self.stages}


@functools.cache
def dense_fp8_kernel(k: int, plan: FewRowsPlan) -> Kernel:
    return Kernel("dense_fp8.cu", "dense_fp8", {"K": k, **plan.defines})


@functools.cache
def capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)
