"""Packed layout of expert weights for the mma.sync kernels: bytes lie as the instruction's registers want them.

A panel is 64 outputs, a unit 64 (bf16) or 128 columns; blocks are ordered [expert, panel, unit], so that what one tile
streams is contiguous. Inside a block: 4 x 16 outputs x 16-byte vectors x 32 lanes, then the 16 outputs' scales (int4:
16 bits each, output r and r + 8 side by side, then as many zero points; e4m3: two float32, of outputs 0-7 and 8-15).
A vector holds a lane's A fragments of mma m16n8k16 for 1 (bf16), 2 (e4m3) or 4 (int4) steps of 16 columns; the eight
values of a step stand so that widening to bf16 costs the fewest instructions: two nibbles 16 bits apart, two bytes 16
bits apart. w13's rows are interleaved by 8 as in `pack.py`. `unpack_*` is the exact inverse.
Idea: prepacked fragments and nibble order as in Marlin (Frantar et al., 2024), here for grouped experts."""

from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import KernelError
from ..quantized import GROUP, Int4Matrix, pack_nibbles, unpack_nibbles
from .pack import deinterleave, interleave

MmaForm = Literal["bf16", "w8a16", "int4"]
UNIT_COLUMNS: dict[MmaForm, int] = {"bf16": 64, "w8a16": 128, "int4": 128}
_VALUE_BITS: dict[MmaForm, int] = {"bf16": 16, "w8a16": 8, "int4": 4}
_PANEL = 64
# Of the eight values of a step: axes k half, output half, pair -> the order in memory
_STEP_ORDER: dict[MmaForm, tuple[int, int, int]] = {"bf16": (0, 1, 2), "w8a16": (0, 2, 1), "int4": (2, 0, 1)}
Matrix = torch.Tensor | Int4Matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMma:
    """One layer's local experts, ready for grouped_gemm_mma."""

    w13: torch.Tensor  # uint8 [num_local_experts, 2 * intermediate / 64, hidden / unit, block bytes]
    w2: torch.Tensor  # uint8 [num_local_experts, hidden / 64, intermediate / unit, block bytes]
    hidden_size: int
    intermediate_size: int
    form: MmaForm
    has_zeros: bool = False  # int4: zero points of their own
    scales_bf16: bool = False  # int4: scales are bfloat16, not float16

    @property
    def num_local_experts(self) -> int:
        return self.w13.shape[0]


def pack_mma(
    w13: Matrix, w2: Matrix, w13_scales: torch.Tensor | None = None, w2_scales: torch.Tensor | None = None
) -> PackedMma:
    """Pack w13 [E, 2 * intermediate, hidden] (gate rows first) and w2 [E, hidden, intermediate]: bf16 tensors, e4m3
    tensors with float32 scales of 128x128 blocks, or int4 matrices. Raises KernelError for what has no kernel."""
    form = _form(w13, w2)
    num_experts, hidden, intermediate = w2.shape
    if tuple(w13.shape) != (num_experts, 2 * intermediate, hidden):
        raise KernelError(
            f"w13 {tuple(w13.shape)} does not fit w2 {tuple(w2.shape)}: expected (E, 2 * intermediate, hidden)"
        )
    if reason := unsupported_mma_shape(hidden, intermediate, num_experts, form):
        raise KernelError(reason)
    has_zeros = False
    if isinstance(w13, Int4Matrix) and isinstance(w2, Int4Matrix):
        has_zeros = w13.zeros is not None or w2.zeros is not None
        _check_int4(w13, w2)
    if form == "w8a16":
        for name, scales, w in (("w13", w13_scales, w13), ("w2", w2_scales, w2)):
            expected = (num_experts, w.shape[1] // 128, w.shape[2] // 128)
            if scales is None or tuple(scales.shape) != expected:
                got = None if scales is None else tuple(scales.shape)
                raise KernelError(f"{name}_scales: got {got}, expected {expected} for 128x128 blocks")
    return PackedMma(
        w13=_pack_stack(w13, w13_scales, form, has_zeros, interleaved=True),
        w2=_pack_stack(w2, w2_scales, form, has_zeros, interleaved=False),
        hidden_size=hidden,
        intermediate_size=intermediate,
        form=form,
        has_zeros=has_zeros,
        scales_bf16=isinstance(w13, Int4Matrix) and w13.scales.dtype == torch.bfloat16,
    )


def unsupported_mma_shape(hidden: int, intermediate: int, num_local_experts: int, form: MmaForm) -> str | None:
    """Why these sizes have no kernel, or None."""
    step = UNIT_COLUMNS[form]
    if hidden % 128 or intermediate % step:
        return f"hidden {hidden} must be a multiple of 128 and intermediate {intermediate} of {step} for {form} kernels"
    if not 0 < num_local_experts <= 512:
        return f"{num_local_experts} local experts; the routing kernel takes 1 to 512"
    return None


def unpack_mma(packed: PackedMma) -> tuple[Matrix, Matrix, torch.Tensor | None, torch.Tensor | None]:
    """The arguments of `pack_mma` (zero points of 8 written out where the layer has any)."""
    w13, s13 = _unpack_stack(packed.w13, packed, interleaved=True)
    w2, s2 = _unpack_stack(packed.w2, packed, interleaved=False)
    return w13, w2, s13, s2


# ------------------------------------------------------------------------------------------------------------ one stack
def _pack_stack(
    w: Matrix, scales: torch.Tensor | None, form: MmaForm, has_zeros: bool, *, interleaved: bool
) -> torch.Tensor:
    """One expert at a time, so that the peak above the result is an expert, not a layer."""
    blocks: torch.Tensor | None = None
    for e in range(w.shape[0]):
        made = _pack_expert(w[e], None if scales is None else scales[e], form, has_zeros, interleaved)
        if blocks is None:
            blocks = torch.empty(w.shape[0], *made.shape, dtype=torch.uint8, device=w.device)
        blocks[e] = made
    assert blocks is not None
    return blocks


def _pack_expert(
    w: Matrix, scales: torch.Tensor | None, form: MmaForm, has_zeros: bool, interleaved: bool
) -> torch.Tensor:
    """[rows, columns] -> uint8 [panels, units, block bytes]."""
    order = interleave if interleaved else _as_is
    if isinstance(w, Int4Matrix):
        values = pack_nibbles(_to_fragments(order(unpack_nibbles(w.nibbles)), form))
        parts = [values, _scales_to_blocks(order(w.scales)).view(torch.uint8)]
        if has_zeros:
            zeros = torch.full_like(w.scales, 8).byte() if w.zeros is None else w.zeros
            points = (-128 - zeros.float()).bfloat16()  # what is added to 128 + q
            parts.append(_scales_to_blocks(order(points)).view(torch.uint8))
        return torch.cat(parts, -1)
    values = _to_fragments(order(w.view(_storage(form))), form).view(torch.uint8)
    if scales is None:
        return values
    rows = order(scales.float().repeat_interleave(128, 0))  # [rows, columns / 128], one scale for each output
    halves = rows.view(-1, 4, 2, 8, rows.shape[1])[:, :, :, 0]  # all 8 outputs of a half share it
    return torch.cat((values, halves.permute(0, 3, 1, 2).flatten(2).contiguous().view(torch.uint8)), -1)


def _unpack_stack(blocks: torch.Tensor, packed: PackedMma, *, interleaved: bool) -> tuple[Matrix, torch.Tensor | None]:
    form, order = packed.form, deinterleave if interleaved else _as_is
    num_value_bytes = _PANEL * UNIT_COLUMNS[form] * _VALUE_BITS[form] // 8
    values, rest = blocks[..., :num_value_bytes], blocks[..., num_value_bytes:]
    if form == "int4":
        dtype = torch.bfloat16 if packed.scales_bf16 else torch.float16
        nibbles = [pack_nibbles(order(_from_fragments(unpack_nibbles(v), form))) for v in values]
        scales = [order(_scales_from_blocks(r[..., : 2 * _PANEL].contiguous().view(dtype))) for r in rest]
        zeros = None
        if packed.has_zeros:
            points = [order(_scales_from_blocks(r[..., 2 * _PANEL :].contiguous().view(torch.bfloat16))) for r in rest]
            zeros = (-128 - torch.stack(points).float()).byte()
        return Int4Matrix(torch.stack(nibbles), torch.stack(scales), zeros), None
    storage = _storage(form)
    w = torch.stack([order(_from_fragments(v.contiguous().view(storage), form)) for v in values])
    if form == "bf16":
        return w.view(torch.bfloat16), None
    halves = rest.contiguous().view(torch.float32).view(*blocks.shape[:3], 4, 2).permute(0, 1, 3, 4, 2)
    scales8 = halves.reshape(blocks.shape[0], -1, blocks.shape[2]).repeat_interleave(8, 1)
    block_scales = torch.stack([order(s)[::128] for s in scales8])
    return w.view(torch.float8_e4m3fn), block_scales


# ----------------------------------------------------------------------------------------------------------- one matrix
def _to_fragments(values: torch.Tensor, form: MmaForm) -> torch.Tensor:
    """[rows, columns] -> [panels, units, values of a block], in the order of memory."""
    unit, per_vector = UNIT_COLUMNS[form], 128 // _VALUE_BITS[form] // 8
    # panel, 16 outputs, output half, g, unit, vector, step, k half, t, pair
    v = values.view(-1, 4, 2, 8, values.shape[1] // unit, unit // 16 // per_vector, per_vector, 2, 4, 2)
    step = [(7, 2, 9)[i] for i in _STEP_ORDER[form]]
    return v.permute(0, 4, 1, 5, 3, 8, 6, *step).reshape(v.shape[0], v.shape[4], -1)


def _from_fragments(blocks: torch.Tensor, form: MmaForm) -> torch.Tensor:
    unit, per_vector = UNIT_COLUMNS[form], 128 // _VALUE_BITS[form] // 8
    v = blocks.view(*blocks.shape[:2], 4, unit // 16 // per_vector, 8, 4, per_vector, 2, 2, 2)
    step = [(7, 2, 9)[i] for i in _STEP_ORDER[form]]
    axes = (0, 4, 1, 5, 3, 8, 6, *step)
    inverse = [axes.index(i) for i in range(10)]
    return v.permute(inverse).reshape(blocks.shape[0] * _PANEL, blocks.shape[1] * unit)


def _scales_to_blocks(scales: torch.Tensor) -> torch.Tensor:
    """[rows, groups] -> [panels, groups, 64], outputs r and r + 8 of 16 side by side."""
    s = scales.view(-1, 4, 2, 8, scales.shape[1])
    return s.permute(0, 4, 1, 3, 2).reshape(s.shape[0], s.shape[4], _PANEL)


def _scales_from_blocks(blocks: torch.Tensor) -> torch.Tensor:
    s = blocks.view(*blocks.shape[:2], 4, 8, 2)
    return s.permute(0, 2, 4, 3, 1).reshape(blocks.shape[0] * _PANEL, blocks.shape[1])


def _as_is(w: torch.Tensor) -> torch.Tensor:
    return w


def _storage(form: MmaForm) -> torch.dtype:
    return torch.int16 if form == "bf16" else torch.uint8


def _form(w13: Matrix, w2: Matrix) -> MmaForm:
    if isinstance(w13, Int4Matrix) and isinstance(w2, Int4Matrix):
        return "int4"
    if isinstance(w13, torch.Tensor) and isinstance(w2, torch.Tensor) and w13.dtype == w2.dtype:
        if w13.dtype == torch.bfloat16:
            return "bf16"
        if w13.dtype == torch.float8_e4m3fn:
            return "w8a16"
    kinds = [w.dtype if isinstance(w, torch.Tensor) else "int4" for w in (w13, w2)]
    raise KernelError(f"expert weights are {kinds[0]} and {kinds[1]}; the kernels take bfloat16, float8_e4m3fn or int4")


def _check_int4(w13: Int4Matrix, w2: Int4Matrix) -> None:
    for name, w in (("w13", w13), ("w2", w2)):
        expected = (*w.shape[:-1], w.shape[-1] // GROUP)
        if w.scales.dtype not in (torch.float16, torch.bfloat16) or w.scales.dtype != w13.scales.dtype:
            raise KernelError(
                f"{name} scales are {w.scales.dtype} (w13's {w13.scales.dtype}); "
                "int4 kernels take float16 or bfloat16, one for the layer"
            )
        if tuple(w.scales.shape) != expected or (w.zeros is not None and tuple(w.zeros.shape) != expected):
            raise KernelError(f"{name} scales {tuple(w.scales.shape)}: expected {expected}, groups of {GROUP}")
