"""Packed layouts of expert weights: what one bulk copy brings must be what wgmma reads.

A block is 128 output rows x 128 bytes of columns (64 bf16 or 128 e4m3) = 16 KiB, contiguous, blocks ordered [expert,
rows / 128, columns]; inside, the 16-byte pieces of row r stand at piece ^ (r & 7): the 128-byte swizzle of the tensor
cores' operands. Rows of w13 are interleaved by 8 (8 gate rows, the same 8 up rows, ...), so that one thread of the
product holds gate and up of one output and SwiGLU needs no exchange. `unpack_*` is the exact inverse; nothing is
rounded. Idea: interleaved gate and up as in the fused epilogues of CUTLASS-based MoE kernels; prepacked blocks as in
Marlin."""

from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import KernelError

WeightForm = Literal["bf16", "fp8"]
_BLOCK_ROWS, _BLOCK_BYTES, _PIECE_BYTES = 128, 128, 16
_EXPERTS_AT_ONCE = 8  # the peak above the result is a few experts, not a layer, and the calls are few


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeights:
    """One layer's local experts, ready for the grouped GEMM."""

    w13: torch.Tensor  # uint8 [num_local_experts, 2 * intermediate / 128, hidden / block_k, 16384]
    w2: torch.Tensor  # uint8 [num_local_experts, hidden / 128, intermediate / block_k, 16384]
    w13_scales: torch.Tensor | None  # fp8: float32 [num_local_experts, 2 * intermediate / 128, hidden / 128]
    w2_scales: torch.Tensor | None  # fp8: float32 [num_local_experts, hidden / 128, intermediate / 128]
    hidden_size: int
    intermediate_size: int
    form: WeightForm

    @property
    def num_local_experts(self) -> int:
        return self.w13.shape[0]


def pack_experts(
    w13: torch.Tensor, w2: torch.Tensor, w13_scales: torch.Tensor | None = None, w2_scales: torch.Tensor | None = None
) -> PackedWeights:
    """Pack `w13` [E, 2 * intermediate, hidden] (gate rows first) and `w2` [E, hidden, intermediate]; bf16, or e4m3
    with 128x128 block scales. Raises KernelError for a shape that the kernels do not take (`unsupported_shape` says
    which)."""
    num_experts, hidden, intermediate = w2.shape
    form: WeightForm = "fp8" if w13.dtype == torch.float8_e4m3fn else "bf16"
    if w13.dtype not in (torch.bfloat16, torch.float8_e4m3fn) or w2.dtype != w13.dtype:
        raise KernelError(f"expert weights are {w13.dtype} and {w2.dtype}; the kernels take bfloat16 or float8_e4m3fn")
    if w13.shape != (num_experts, 2 * intermediate, hidden):
        raise KernelError(
            f"w13 {tuple(w13.shape)} does not fit w2 {tuple(w2.shape)}: expected (E, 2 * intermediate, hidden)"
        )
    if reason := unsupported_shape(hidden, intermediate, num_experts, form):
        raise KernelError(reason)
    if form == "fp8":
        expected = (
            (num_experts, 2 * intermediate // 128, hidden // 128),
            (num_experts, hidden // 128, intermediate // 128),
        )
        for name, scales, shape in (("w13", w13_scales, expected[0]), ("w2", w2_scales, expected[1])):
            if scales is None or tuple(scales.shape) != shape:
                got = None if scales is None else tuple(scales.shape)
                raise KernelError(f"{name}_scales: got {got}, expected {shape} for 128x128 blocks")
    return PackedWeights(
        w13=pack_w13(w13),
        w2=pack_w2(w2),
        w13_scales=None if w13_scales is None else w13_scales.float().contiguous(),
        w2_scales=None if w2_scales is None else w2_scales.float().contiguous(),
        hidden_size=hidden,
        intermediate_size=intermediate,
        form=form,
    )


def unsupported_shape(hidden: int, intermediate: int, num_local_experts: int, form: WeightForm) -> str | None:
    """Why these sizes have no kernel, or None."""
    hidden_step, intermediate_step = (256, 128) if form == "fp8" else (128, 64)
    if hidden % hidden_step or intermediate % intermediate_step:
        return (
            f"hidden {hidden} must be a multiple of {hidden_step} and intermediate {intermediate} "
            f"of {intermediate_step} for {form} kernels"
        )
    if not 0 < num_local_experts <= 512:
        return f"{num_local_experts} local experts; the routing kernel takes 1 to 512"
    return None


def pack_w13(w13: torch.Tensor) -> torch.Tensor:
    """[E, 2 * intermediate, hidden] -> uint8 [E, 2 * intermediate / 128, hidden / block_k, 16384]."""
    out = _empty_packed(w13)
    for few, packed in zip(w13.split(_EXPERTS_AT_ONCE), out.split(_EXPERTS_AT_ONCE), strict=True):
        packed.copy_(_pack_matrices(few.unflatten(1, (2, -1, 8)).transpose(1, 2).flatten(1, 3)))  # as `interleave`
    return out


def pack_w2(w2: torch.Tensor) -> torch.Tensor:
    """[E, hidden, intermediate] -> uint8 [E, hidden / 128, intermediate / block_k, 16384]."""
    out = _empty_packed(w2)
    for few, packed in zip(w2.split(_EXPERTS_AT_ONCE), out.split(_EXPERTS_AT_ONCE), strict=True):
        packed.copy_(_pack_matrices(few))
    return out


def unpack_w13(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.stack([deinterleave(_unpack_matrix(p, dtype)) for p in packed])


def unpack_w2(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.stack([_unpack_matrix(p, dtype) for p in packed])


def _empty_packed(w: torch.Tensor) -> torch.Tensor:
    num_experts, rows, columns = w.shape
    blocks = columns * w.element_size() // _BLOCK_BYTES
    return torch.empty(
        num_experts, rows // _BLOCK_ROWS, blocks, _BLOCK_ROWS * _BLOCK_BYTES, dtype=torch.uint8, device=w.device
    )


def interleave(w: torch.Tensor) -> torch.Tensor:
    """[2 * intermediate, hidden], gate then up -> 8 gate rows, their 8 up rows, ..."""
    return w.view(2, -1, 8, w.shape[1]).transpose(0, 1).reshape(w.shape)


def deinterleave(w: torch.Tensor) -> torch.Tensor:
    return w.view(-1, 2, 8, w.shape[1]).transpose(0, 1).reshape(w.shape)


def _pack_matrices(w: torch.Tensor) -> torch.Tensor:
    """[E, rows, columns] -> uint8 [E, rows / 128, column blocks, 16384]. A piece moves as two 8-byte numbers."""
    raw = w.contiguous().view(torch.int64)
    blocks = raw.view(w.shape[0], w.shape[1] // _BLOCK_ROWS, _BLOCK_ROWS, -1, _BLOCK_BYTES // _PIECE_BYTES, 2)
    return swizzle(blocks.transpose(2, 3)).flatten(3).view(torch.uint8)


def _unpack_matrix(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    blocks = packed.view(packed.shape[0], packed.shape[1], _BLOCK_ROWS, _BLOCK_BYTES // _PIECE_BYTES, _PIECE_BYTES)
    return swizzle(blocks).transpose(1, 2).reshape(packed.shape[0] * _BLOCK_ROWS, -1).view(dtype)


def swizzle(blocks: torch.Tensor) -> torch.Tensor:
    """Exchange the pieces of each row, [..., rows, 8, 16]: piece p of row r goes to p ^ (r & 7). Its own inverse."""
    rows, pieces = blocks.shape[-3], blocks.shape[-2]
    order = torch.arange(rows, device=blocks.device)[:, None] % 8 ^ torch.arange(pieces, device=blocks.device)
    return torch.gather(blocks, -2, order[:, :, None].expand(blocks.shape))
