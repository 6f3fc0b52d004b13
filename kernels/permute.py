"""Put (row, k) pairs into expert order on the device: `route` decides places, `pack_rows` gathers; `route_and_pack`
does both in one launch for few pairs. No host sync.

The counts stay on the device, so every buffer is sized for the worst case that the shapes allow; memory that no pair
needs is reserved, never touched."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import KernelError
from .expert_work import LayerWork
from .jit import Kernel, num_sms, since_hopper

SHARED_ROUTE_PAIRS = 2048  # from here on a cluster of CTAs is faster than one
ONE_LAUNCH_PAIRS = 4096  # the most that route_and_pack's shared memory holds
ONE_LAUNCH_LOCAL_PAIRS = 1024  # where more are expected to be local, two launches gather faster
PAIR_A_CTA = 64  # up to here a CTA a pair takes 2 us where few CTAs take 2.5 to 3.8; its kernel takes no more
FEW_PAIRS = 512  # up to here it takes so little that the products' CTAs find room beside it
ONE_LAUNCH_EXPERTS = 256
FEWEST_TILES = 32  # memory that the grouped GEMM may read of the list of tiles, whatever their number


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
    work: LayerWork | None = None,  # where it notes that a product begins, and the rows of each expert
) -> RoutePlan:
    """`ids` [num_rows, top_k] int32: local experts, or physical ones when `expert_map` ([num_physical] int32 on the
    device, local slot or -1) translates; anything outside is no pair of ours. An expert's rows are cut evenly into
    as few tiles of at most `tile` rows as hold them, each but the last a multiple of `granule` rows."""
    plan = _unrouted(ids, num_local_experts, tile, expert_map)
    pairs = ids.numel()
    num_ctas = 8 if pairs >= SHARED_ROUTE_PAIRS and since_hopper(ids.device.index) else 1
    route_kernel(num_local_experts, num_ctas).launch(
        (num_ctas,),
        1024 if num_local_experts <= 256 else 512,
        (
            ids,
            np.int64(pairs),
            expert_map,
            np.int32(0 if expert_map is None else expert_map.numel()),
            np.int32(tile),
            np.int32(granule),
            plan.num_tokens_per_expert,
            plan.pair_of_row,
            plan.tiles,
            plan.ready,
            plan.state,
            work and work.clock,
            work and work.rows,
        ),
        device=ids.device,
    )
    return plan


def _unrouted(ids: torch.Tensor, num_local_experts: int, tile: int, expert_map: torch.Tensor | None) -> RoutePlan:
    """Memory for the places of these ids."""
    check_ids(ids, expert_map)
    num_rows, top_k = ids.shape
    pairs = num_rows * top_k
    capacity = (pairs + 7 * min(num_local_experts, pairs) + 7) // 8 * 8
    max_tiles = max(FEWEST_TILES, pairs // tile + min(num_local_experts, pairs))
    parts = (4 * max_tiles, 4, capacity, num_local_experts, max_tiles)
    tiles, state, pair_of_row, counts, ready = torch.empty(sum(parts), dtype=torch.int32, device=ids.device).split(
        parts
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
    packed, scales = _unpacked(rows, plan, fp8)
    hidden = rows.shape[1]
    grid = min(-(-_gathers(packed, plan.capacity, fp8) // 8), 8 * num_sms(rows.device.index))
    pack_kernel(hidden, plan.top_k, fp8).launch(
        (grid,), 256, (rows, plan.pair_of_row, plan.state, np.int64(plan.capacity), packed, scales), device=rows.device
    )
    return packed, scales


def route_and_pack(
    rows: torch.Tensor,
    ids: torch.Tensor,
    num_local_experts: int,
    tile: int,
    expert_map: torch.Tensor | None = None,
    *,
    granule: int = 8,
    fp8: bool = False,
    work: LayerWork | None = None,
) -> tuple[RoutePlan, torch.Tensor, torch.Tensor | None]:
    """`route` and `pack_rows` in one launch, for what `takes_one_launch`."""
    plan = _unrouted(ids, num_local_experts, tile, expert_map)
    packed, scales = _unpacked(rows, plan, fp8)
    pairs, hidden = ids.numel(), rows.shape[1]
    if 0 < pairs <= PAIR_A_CTA:
        kernel = route_and_pack_pairs_kernel(num_local_experts, hidden, plan.top_k, fp8, tile)
        grid, threads = pairs, min(256, -(-hidden // 256) * 32)
    else:
        most = FEW_PAIRS if pairs <= FEW_PAIRS else ONE_LAUNCH_PAIRS
        kernel = route_and_pack_kernel(num_local_experts, hidden, plan.top_k, fp8, most)
        grid = min(-(-_gathers(packed, plan.capacity, fp8) // 16), 2 * num_sms(rows.device.index))
        threads = 512
    kernel.launch(
        (grid,),
        threads,
        (
            ids,
            np.int32(pairs),
            expert_map,
            np.int32(0 if expert_map is None else expert_map.numel()),
            np.int32(tile),
            np.int32(granule),
            rows,
            np.int64(plan.capacity),
            plan.num_tokens_per_expert,
            plan.pair_of_row,
            plan.tiles,
            plan.ready,
            plan.state,
            packed,
            scales,
            work and work.clock,
            work and work.rows,
        ),
        device=rows.device,
    )
    return plan, packed, scales


def takes_one_launch(num_pairs: int, expected_pairs: float, num_local_experts: int) -> bool:
    return (
        num_pairs <= ONE_LAUNCH_PAIRS
        and expected_pairs <= ONE_LAUNCH_LOCAL_PAIRS
        and num_local_experts <= ONE_LAUNCH_EXPERTS
    )


def _unpacked(rows: torch.Tensor, plan: RoutePlan, fp8: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    blocks = rows.shape[1] // (128 if fp8 else 64)
    packed = torch.empty(blocks, plan.capacity, 128, dtype=torch.uint8, device=rows.device)
    return packed, torch.empty(blocks, plan.capacity, dtype=torch.float32, device=rows.device) if fp8 else None


def _gathers(packed: torch.Tensor, capacity: int, fp8: bool) -> int:
    """A warp's turns if every place were used."""
    blocks = packed.shape[0]
    return capacity // (2 if fp8 else 4) * (blocks // (4 if blocks % 4 == 0 else 2 if blocks % 2 == 0 else 1))


def check_ids(ids: torch.Tensor, expert_map: torch.Tensor | None) -> None:
    for name, tensor in (("row_expert_ids", ids), ("expert_map", expert_map)):
        if tensor is not None and (tensor.dtype != torch.int32 or not tensor.is_contiguous()):
            raise KernelError(f"{name} must be contiguous int32, got {tensor.dtype} with strides {tensor.stride()}")


def one_launch_kernels(
    num_local_experts: int, hidden: int, top_k: int, fp8: bool, tiles: Iterable[int]
) -> list[Kernel]:
    """All that `route_and_pack` may launch for plans of these tiles."""
    if num_local_experts > ONE_LAUNCH_EXPERTS:
        return []
    sizes = num_local_experts, hidden, top_k, fp8
    pairs = [route_and_pack_pairs_kernel(*sizes, tile) for tile in sorted(set(tiles))]
    return [*pairs, *(route_and_pack_kernel(*sizes, most) for most in (FEW_PAIRS, ONE_LAUNCH_PAIRS))]


@functools.cache
def route_kernel(num_local_experts: int, num_ctas: int = 1) -> Kernel:
    return Kernel("permute.cu", "route", {"NUM_EXPERTS": num_local_experts, "ROUTE_CTAS": num_ctas})


@functools.cache
def pack_kernel(hidden: int, top_k: int, fp8: bool) -> Kernel:
    return Kernel("permute.cu", "pack", {"HIDDEN": hidden, "TOP_K": top_k, "FP8": int(fp8)})


@functools.cache
def route_and_pack_kernel(num_local_experts: int, hidden: int, top_k: int, fp8: bool, most_pairs: int) -> Kernel:
    defines = {"NUM_EXPERTS": num_local_experts, "HIDDEN": hidden, "TOP_K": top_k, "FP8": int(fp8)}
    return Kernel("permute_few.cu", "route_and_pack", {**defines, "MAX_PAIRS": most_pairs})


@functools.cache
def route_and_pack_pairs_kernel(num_local_experts: int, hidden: int, top_k: int, fp8: bool, tile: int) -> Kernel:
    defines = {"NUM_EXPERTS": num_local_experts, "HIDDEN": hidden, "TOP_K": top_k, "FP8": int(fp8)}
    return Kernel("permute_pairs.cu", "route_and_pack_pairs", {**defines, "TILE": tile})
