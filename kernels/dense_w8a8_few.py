"""x @ w^T of fp8 checkpoints' dense layers for 17 to 128 rows: rows are quantised too, a scale for each 128 columns.

Why: widening weights to bf16 takes the time of reading them from some 16 rows on; multiplied as they are, they stay
bound by the memory. Numbers as in `dense_w8a8.py`, but a row's bits depend on that row and w alone: no sum is shared by
CTAs."""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from .checks import require, require_sizes
from .dense_fp8 import BF16, BLOCK, Fp8Weight, num_slices, outputs_of_slice
from .dense_w8a8 import has_kernel, quantize_rows
from .jit import Kernel, num_sms

MAX_ROWS = 128  # of one launch
_TILES = (8, 16, 32, 64, 128)
_SHARED_BYTES = (227 << 10) - 1024
_BEYOND_BYTES = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicePlan:
    """How `dense_w8a8_few.cu` is compiled."""

    tile: int  # rows
    outputs: int  # of a CTA, at most
    parts: int  # k-blocks that are multiplied at the same time
    stages: int

    @classmethod
    @functools.cache
    def choose(cls, num_rows: int, outputs: int, k: int) -> "SlicePlan":
        """Two warpgroups that multiply: for 64 outputs each, or for every other k-block. The same for any number of
        rows; as many slots (12 at most) as the shared memory holds."""
        parts = 2 if outputs <= 64 and k % (2 * BLOCK) == 0 else 1
        tile = next(tile for tile in _TILES if num_rows <= tile)
        plan = cls(tile=tile, outputs=outputs, parts=parts, stages=1)
        one = plan.shared_bytes - _BEYOND_BYTES
        return cls(tile=tile, outputs=outputs, parts=parts, stages=min(12, (_SHARED_BYTES - _BEYOND_BYTES) // one))

    @property
    def num_threads(self) -> int:
        return 128 * (self.parts * -(-self.outputs // 64) + 1)

    @property
    def shared_bytes(self) -> int:
        return _BEYOND_BYTES + self.stages * self.parts * ((self.outputs + self.tile) * BLOCK + 4 * self.tile)

    @property
    def defines(self) -> dict[str, int]:
        return {"TILE": self.tile, "OUTPUTS": self.outputs, "PARTS": self.parts, "STAGES": self.stages}


def dense_w8a8_few(x: torch.Tensor, w: Fp8Weight, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K] bf16, w [N, K] -> [M, N] bf16. Up to `MAX_ROWS` rows are one launch; more are several."""
    num_rows, (num_outputs, k) = x.shape[0], w.shape
    require_sizes(has_kernel(x.device), "dense_w8a8_few needs a GPU of capability 9.0: use dense_fp8 or dequantize_fp8")
    require("x", x, BF16, (None, k))
    if out is None:
        out = torch.empty(num_rows, num_outputs, dtype=BF16, device=x.device)
    require("out", out, BF16, (num_rows, num_outputs))
    for rows, result in [(x, out)] if num_rows <= MAX_ROWS else zip(x.split(MAX_ROWS), out.split(MAX_ROWS)):
        _launch(rows, w, result)
    return out


def _launch(x: torch.Tensor, w: Fp8Weight, out: torch.Tensor) -> None:
    num_rows, (num_outputs, k) = x.shape[0], w.shape
    if not num_rows:
        return
    num_ctas = num_slices(num_outputs, num_sms(x.device.index or 0))
    plan = SlicePlan.choose(num_rows, outputs_of_slice(num_outputs, num_ctas), k)
    packed, scales = quantize_rows(x, (num_rows + 7) // 8 * 8)
    dense_w8a8_few_kernel(k, plan).launch(
        (num_ctas,),
        plan.num_threads,
        (w.packed, w.scales, packed, scales, np.int32(num_rows), out, np.int32(num_outputs)),
        device=x.device,
        shared_bytes=plan.shared_bytes,
    )


@functools.cache
def dense_w8a8_few_kernel(k: int, plan: SlicePlan) -> Kernel:
    return Kernel("dense_w8a8_few.cu", "dense_w8a8_few", {"K": k, **plan.defines})
