"""Put (row, k) pairs into expert order on the device: `route` decides places, `pack_rows` gathers. No host sync.

The counts stay on the device, so every buffer is sized for the worst case that the shapes allow; memory that no pair
needs is reserved, never touched."""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import KernelError
from .jit import Kernel

SHARED_ROUTE_PAIRS = 2048  # from here on a cluster of CTAs is faster than one


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutePlan:
    """Where the pairs of one call go; one allocation, viewed in parts."""

    num_tokens_per_expert: torch.Tensor  # [num_local_experts] int32
    pair_of_row: torch.Tensor  # [capacity] int32, row * top_k + k, -1 padding
    tiles: torch.Tensor  # [max_tiles, 4] int32: expert, first_row, num_rows, 0
    ready: torch.Tensor  # [max_tiles] int32, w13 tiles finished, counted by the grouped GEMM
    state: torch.Tensor  # [4] int32: tiles, padded rows, pairs, next tile to claim
    capacity: int
    top_k: int


def route(
    ids: torch.Tensor,
    num_local_experts: int,
    tile: int,
    expert_map: torch.Tensor | None = None,
    *,
    granule: int = 8,
) -> RoutePlan:
    """`ids` [num_rows, top_k] int32: local experts, or physical ones when `expert_map` ([num_physical] int32 on the
    device, local slot or -1) translates; anything outside is no pair of ours. An expert's rows are cut evenly into
    as few tiles of at most `tile` rows as hold them, each but the last a multiple of `granule` rows."""
    check_ids(ids, expert_map)
    num_rows, top_k = ids.shape
    pairs = num_rows * top_k
    capacity = (pairs + 7 * min(num_local_experts, pairs) + 7) // 8 * 8
    max_tiles = pairs // tile + min(num_local_experts, pairs)
    parts = (4 * max_tiles, capacity, num_local_experts, max_tiles, 4)
    tiles, pair_of_row, counts, ready, state = torch.empty(sum(parts), dtype=torch.int32, device=ids.device).split(
        parts
    )
    has_map = expert_map is not None
    num_ctas = 8 if pairs >= SHARED_ROUTE_PAIRS and torch.cuda.get_device_capability(ids.device)[0] >= 9 else 1
    route_kernel(num_local_experts, num_ctas).launch(
        (num_ctas,),
        1024 if num_local_experts <= 256 else 512,
        (
            ids,
            np.int64(pairs),
            expert_map,
            np.int32(expert_map.numel() if has_map else 0),  # type: ignore[union-attr]
            np.int32(tile),
            np.int32(granule),
            counts,
            pair_of_row,
            tiles,
            ready,
            state,
        ),
        device=ids.device,
    )
    return RoutePlan(
        num_tokens_per_expert=counts,
        pair_of_row=pair_of_row,
        tiles=tiles.view(-1, 4),
        ready=ready,
        state=state,
        capacity=capacity,
        top_k=top_k,
    )


def pack_rows(rows: torch.Tensor, plan: RoutePlan, *, fp8: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gather `rows` [num_rows, hidden] bf16 into swizzled k-blocks, uint8 [blocks, capacity, 128]; with `fp8` also
    float32 scales [blocks, capacity]."""
    hidden = rows.shape[1]
    blocks = hidden // (128 if fp8 else 64)
    packed = torch.empty(blocks, plan.capacity, 128, dtype=torch.uint8, device=rows.device)
    scales = torch.empty(blocks, plan.capacity, dtype=torch.float32, device=rows.device) if fp8 else None
    items = plan.capacity // (2 if fp8 else 4) * blocks // (4 if blocks % 4 == 0 else 2 if blocks % 2 == 0 else 1)
    grid = min(-(-items // 8), 8 * torch.cuda.get_device_properties(rows.device).multi_processor_count)
    pack_kernel(hidden, plan.top_k, fp8).launch(
        (grid,), 256, (rows, plan.pair_of_row, plan.state, np.int64(plan.capacity), packed, scales), device=rows.device
    )
    return packed, scales


def check_ids(ids: torch.Tensor, expert_map: torch.Tensor | None) -> None:
    for name, tensor in (("row_expert_ids", ids), ("expert_map", expert_map)):
        if tensor is not None and (tensor.dtype != torch.int32 or not tensor.is_contiguous()):
            raise KernelError(f"{name} must be contiguous int32, got {tensor.dtype} with strides {tensor.stride()}")


@functools.cache
def route_kernel(num_local_experts: int, num_ctas: int = 1) -> Kernel:
    return Kernel("permute.cu", "route", {"NUM_EXPERTS": num_local_experts, "ROUTE_CTAS": num_ctas})


@functools.cache
def pack_kernel(hidden: int, top_k: int, fp8: bool) -> Kernel:
    return Kernel("permute.cu", "pack", {"HIDDEN": hidden, "TOP_K": top_k, "FP8": int(fp8)})
