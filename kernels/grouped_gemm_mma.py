"""Both expert products in one persistent launch by mma.sync: bf16 rows in, one output row per (row, k) pair; weights
bf16, e4m3 (W8A16) or int4. See grouped_gemm_mma.cu. Runs on compute capability 8.0 and later; Hopper takes it for
int4 and W8A16, everything else for all forms."""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from .jit import Kernel, num_sms
from .pack_mma import UNIT_COLUMNS, MmaForm, PackedMma
from .permute import RoutePlan

SHARED_BYTES = {(8, 0): 163 << 10, (8, 6): 99 << 10, (8, 9): 99 << 10, (12, 0): 99 << 10}  # a CTA's most; else 227 KiB
_FORM_NUMBERS: dict[MmaForm, int] = {"bf16": 0, "w8a16": 1, "int4": 2}
_BLOCK_BYTES: dict[MmaForm, int] = {"bf16": 8192, "w8a16": 8192 + 32, "int4": 4096 + 128}


@dataclass(frozen=True, slots=True, kw_only=True)
class MmaPlan:
    """How the work is cut. Changes speed only: every plan adds up each output in the same order."""

    m_rows: int  # outputs of a tile: 64 or 128
    tile: int  # most rows of one expert in a tile: 8, 16 or 32
    stages: int  # slots of the ring
    ctas: int = 1  # on one multiprocessor
    parts: int = 2  # of the columns, each with warps of its own: 2 or 4
    form: MmaForm
    has_zeros: bool = False

    @property
    def stage_bytes(self) -> int:
        return stage_bytes(self.m_rows, self.tile, self.form, self.has_zeros, self.parts)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the ring and the exchange of partial sums."""
        return self.stages * self.stage_bytes + exchange_bytes(self.m_rows, self.tile, self.parts)

    @property
    def num_threads(self) -> int:
        return 32 * (self.m_rows // 16 * self.parts + 2)

    def defines(self, hidden_size: int, intermediate_size: int, top_k: int) -> dict[str, int]:
        return {
            "HIDDEN": hidden_size,
            "INTERMEDIATE": intermediate_size,
            "TOP_K": top_k,
            "M_ROWS": self.m_rows,
            "TILE": self.tile,
            "STAGES": self.stages,
            "CTAS": self.ctas,
            "PARTS": self.parts,
            "FORM": _FORM_NUMBERS[self.form],
            "ZEROS": int(self.has_zeros),
        }


def stage_bytes(m_rows: int, tile: int, form: MmaForm, has_zeros: bool, parts: int) -> int:
    """One slot of the ring: a unit of columns for each part, of the weights and of the rows."""
    block = _BLOCK_BYTES[form] + (128 if has_zeros else 0)
    return m_rows // 64 * parts * block + tile * (2 * parts * UNIT_COLUMNS[form] + 16)


def exchange_bytes(m_rows: int, tile: int, parts: int) -> int:
    """The sums of all parts but the first."""
    return (parts - 1) * (4 // parts) * m_rows * tile * 4


def make_plan(
    m_rows: int,
    tile: int,
    form: MmaForm,
    *,
    ctas: int = 1,
    parts: int = 2,
    has_zeros: bool = False,
    capability: tuple[int, int] = (9, 0),
) -> MmaPlan:
    """As many stages as the shared memory of a multiprocessor holds, 12 at most."""
    limit = SHARED_BYTES.get(capability, 227 << 10)
    room = (
        (limit - (ctas - 1) * 1024) // ctas - 1024 - exchange_bytes(m_rows, tile, parts)
    )  # 1 KiB: barriers, the queue
    stages = min(12, room // stage_bytes(m_rows, tile, form, has_zeros, parts))
    return MmaPlan(m_rows=m_rows, tile=tile, stages=stages, ctas=ctas, parts=parts, form=form, has_zeros=has_zeros)


FEW_TILES = 1000  # of 64 outputs: up to here one CTA on a multiprocessor is faster than two


def choose_mma_plan(
    form: MmaForm,
    expected_pairs: float,
    num_local_experts: int,
    hidden_size: int,
    intermediate_size: int,
    *,
    has_zeros: bool = False,
    capability: tuple[int, int] = (9, 0),
) -> MmaPlan:
    """Few rows per expert: narrow tiles, so that the ring holds weights. int4 with enough work: two CTAs share a
    multiprocessor, so that one streams while the other finishes a tile; on Hopper alone, where it was run: the kernel
    needs all its CTAs resident. The first of these of which three stages fit."""
    rows = expected_pairs / num_local_experts
    touched = num_local_experts * (1 - (1 - 1 / num_local_experts) ** expected_pairs)
    few = form != "int4" or touched * (2 * intermediate_size + hidden_size) / 64 <= FEW_TILES
    if rows <= 4:
        wanted = [(8, 1, 4), (8, 1, 2)] if few else [(8, 2, 4), (8, 1, 4), (8, 1, 2)]
    else:
        wanted = [(16, 2, 2), (16, 1, 2)] if rows <= 12 else [(32, 1, 4), (32, 1, 2), (16, 1, 2)]
    if capability != (9, 0):
        wanted = [w for w in wanted if w[1] == 1]
    for tile, ctas, parts in wanted:
        plan = make_plan(64, tile, form, ctas=ctas, parts=parts, has_zeros=has_zeros, capability=capability)
        if plan.stages >= 3:
            break
    return plan


def grouped_gemm_mma(
    rows: torch.Tensor,
    weights: PackedMma,
    route: RoutePlan,
    plan: MmaPlan,
    out: torch.Tensor,
    clock: torch.Tensor | None = None,  # LayerWork.clock
) -> None:
    """Write `out` [num_rows, top_k, hidden] bf16 for every pair in `route`; rows of other pairs are left as they are.
    `route` is spent: its claims and counters are used up."""
    device = rows.device
    h = torch.empty(route.capacity, weights.intermediate_size, dtype=torch.bfloat16, device=device)
    tiles_per_entry = (2 * weights.intermediate_size + weights.hidden_size) // plan.m_rows
    most_tiles = route.tiles.shape[0] * tiles_per_entry
    grid = min(plan.ctas * num_sms(device.index), most_tiles)
    kernel = mma_kernel(plan, weights.hidden_size, weights.intermediate_size, route.top_k, weights.scales_bf16)
    kernel.launch(
        (grid,),
        plan.num_threads,
        (
            weights.w13,
            weights.w2,
            rows,
            h,
            out,
            route.pair_of_row,
            route.tiles,
            np.int32(route.tiles.shape[0]),
            route.ready,
            route.state,
            clock,
        ),
        device=device,
        shared_bytes=plan.shared_bytes,
    )


@functools.cache
def mma_kernel(plan: MmaPlan, hidden_size: int, intermediate_size: int, top_k: int, scales_bf16: bool) -> Kernel:
    defines = plan.defines(hidden_size, intermediate_size, top_k)
    return Kernel("grouped_gemm_mma.cu", "grouped_gemm_mma", {**defines, "SCALES_BF16": int(scales_bf16)})
