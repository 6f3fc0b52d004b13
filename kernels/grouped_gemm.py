"""Both expert products in one persistent launch: packed rows in, one output row per (row, k) pair. See
grouped_gemm.cu."""

import functools

import numpy as np
import torch

from .jit import Kernel, num_sms
from .pack import PackedWeights
from .permute import RoutePlan
from .plan import GemmPlan


def grouped_gemm(
    packed_rows: torch.Tensor,
    row_scales: torch.Tensor | None,
    weights: PackedWeights,
    route: RoutePlan,
    plan: GemmPlan,
    out: torch.Tensor,
    clock: torch.Tensor | None = None,  # LayerWork.clock
) -> None:
    """Write `out` [num_rows, top_k, hidden] bf16 for every pair in `route`; rows of other pairs are left as they are.
    `route` is spent: its claims and counters are used up."""
    device = packed_rows.device
    fp8 = weights.form == "fp8"
    blocks = weights.intermediate_size // (128 if fp8 else 64)
    h = torch.empty(blocks, route.capacity, 128, dtype=torch.uint8, device=device)
    h_scales = torch.empty(2 * blocks, route.capacity, dtype=torch.float32, device=device) if fp8 else None
    tiles_per_entry = (2 * weights.intermediate_size + weights.hidden_size) // plan.m_rows
    most_tiles = route.tiles.shape[0] * tiles_per_entry
    grid = min(num_sms(device.index), most_tiles) // plan.cluster * plan.cluster
    gemm_kernel(plan, weights.hidden_size, weights.intermediate_size).launch(
        (grid,),
        plan.num_threads,
        (
            weights.w13,
            weights.w2,
            weights.w13_scales,
            weights.w2_scales,
            packed_rows,
            row_scales,
            h,
            h_scales,
            out,
            route.pair_of_row,
            route.tiles,
            route.ready,
            route.state,
            np.int64(route.capacity),
            clock,
        ),
        device=device,
        shared_bytes=plan.shared_bytes,
    )


@functools.cache
def gemm_kernel(plan: GemmPlan, hidden_size: int, intermediate_size: int) -> Kernel:
    return Kernel("grouped_gemm.cu", "grouped_gemm", plan.defines(hidden_size, intermediate_size))
