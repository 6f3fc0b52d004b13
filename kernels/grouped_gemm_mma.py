"""Both expert products in one persistent launch by mma.sync: bf16 rows in, one output row per (row, k) pair; weights
bf16, e4m3 (W8A16) or int4. See grouped_gemm_mma.cu. Runs on compute capability 8.0 and later; Hopper takes it for
int4 and W8A16, everything else for all forms."""

import functools
from dataclasses import dataclass

import torch

from .jit import Kernel
from .pack_mma import UNIT_COLUMNS, MmaForm, PackedMma
from .permute import RoutePlan

SHARED_BYTES = {(8, 0): 163 << 10, (8, 6): 99 << 10, (8, 9): 99 << 10, (12, 0): 99 << 10}  # a CTA's most; else 227 KiB
_FORM_NUMBERS: dict[MmaForm, int] = {"bf16": 0, "w8a16": 1, "int4": 2}
_BLOCK_BYTES: dict[MmaForm, int] = {"bf16": 8192, "w8a16": 8192 + 32, "int4": 4096 + 128}


@dataclass(frozen=True, slots=True, kw_only=True)
class MmaPlan:
    """How the work is cut. Changes speed only: every plan adds up each output in the same order."""

    m_rows: int  # outputs of a tile: 64 or 128
    tile: int  # most rows of one expert in a tile: 16, 32 or 64
    stages: int  # slots of the ring
    ctas: int = 1  # on one multiprocessor
    form: MmaForm
    has_zeros: bool = False

    @property
    def stage_bytes(self) -> int:
        return stage_bytes(self.m_rows, self.tile, self.form, self.has_zeros)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the ring and the exchange of partial sums."""
        return self.stages * self.stage_bytes + self.m_rows * self.tile * 4

    @property
    def num_threads(self) -> int:
        return 32 * (self.m_rows // 8 + 2)

    def defines(self, hidden_size: int, intermediate_size: int, top_k: int) -> dict[str, int]:
        return {
            "HIDDEN": hidden_size,
            "INTERMEDIATE": intermediate_size,
            "TOP_K": top_k,
            "M_ROWS": self.m_rows,
            "TILE": self.tile,
            "STAGES": self.stages,
            "CTAS": self.ctas,
            "FORM": _FORM_NUMBERS[self.form],
            "ZEROS": int(self.has_zeros),
        }


def stage_bytes(m_rows: int, tile: int, form: MmaForm, has_zeros: bool) -> int:
    """One slot of the ring: two units of columns of the weights and of the rows."""
    block = _BLOCK_BYTES[form] + (128 if has_zeros else 0)
    return m_rows // 64 * 2 * block + tile * (4 * UNIT_COLUMNS[form] + 16)


def make_plan(
    m_rows: int,
    tile: int,
    form: MmaForm,
    *,
    ctas: int = 1,
    has_zeros: bool = False,
    capability: tuple[int, int] = (9, 0),
) -> MmaPlan:
    """As many stages as the shared memory of a multiprocessor holds, 12 at most."""
    limit = SHARED_BYTES.get(capability, 227 << 10)
    room = (limit - (ctas - 1) * 1024) // ctas - 1024 - m_rows * tile * 4  # 1 KiB: barriers, the queue
    stages = min(12, room // stage_bytes(m_rows, tile, form, has_zeros))
    return MmaPlan(m_rows=m_rows, tile=tile, stages=stages, ctas=ctas, form=form, has_zeros=has_zeros)


def choose_mma_plan(
    form: MmaForm,
    expected_pairs: float,
    num_local_experts: int,
    *,
    has_zeros: bool = False,
    capability: tuple[int, int] = (9, 0),
) -> MmaPlan:
    """Few rows per expert: narrow tiles, so that the ring holds weights. Many: the widest tile of which three stages
    fit."""
    rows = expected_pairs / num_local_experts
    wanted = 16 if rows <= 12 else 32 if rows <= 24 else 64
    for tile in (64, 32, 16):
        plan = make_plan(64, tile, form, has_zeros=has_zeros, capability=capability)
        if tile <= wanted and (plan.stages >= 3 or tile == 16):
            break
    return plan


def grouped_gemm_mma(
    rows: torch.Tensor, weights: PackedMma, route: RoutePlan, plan: MmaPlan, out: torch.Tensor
) -> None:
    """Write `out` [num_rows, top_k, hidden] bf16 for every pair in `route`; rows of other pairs are left as they are.
    `route` is spent: its claims and counters are used up."""
    device = rows.device
    h = torch.empty(route.capacity, weights.intermediate_size, dtype=torch.bfloat16, device=device)
    tiles_per_entry = (2 * weights.intermediate_size + weights.hidden_size) // plan.m_rows
    most_tiles = route.tiles.shape[0] * tiles_per_entry
    grid = min(plan.ctas * torch.cuda.get_device_properties(device).multi_processor_count, most_tiles)
    kernel = mma_kernel(plan, weights.hidden_size, weights.intermediate_size, route.top_k, weights.scales_bf16)
    kernel.launch(
        (grid,),
        plan.num_threads,
        (weights.w13, weights.w2, rows, h, out, route.pair_of_row, route.tiles, route.ready, route.state),
        device=device,
        shared_bytes=plan.shared_bytes,
    )


_debug_defines: dict[str, int] = {}


def set_debug(**defines: int) -> None:
    """WATCHDOG=1: a wait of some seconds is an error instead of a hang; CP_ASYNC=1: copy as sm_80 does. For tests."""
    _debug_defines.clear()
    _debug_defines.update(defines)
    mma_kernel.cache_clear()


@functools.cache
def mma_kernel(plan: MmaPlan, hidden_size: int, intermediate_size: int, top_k: int, scales_bf16: bool) -> Kernel:
    defines = plan.defines(hidden_size, intermediate_size, top_k)
    return Kernel(
        "grouped_gemm_mma.cu", "grouped_gemm_mma", {**defines, "SCALES_BF16": int(scales_bf16), **_debug_defines}
    )
