"""Both expert products of one token in one launch, from its row and ids to a row for each of its experts: what
`route_and_pack` and `grouped_gemm` make, for bf16. See thin_experts.cu."""

import functools

import numpy as np
import torch

from .expert_work import LayerWork
from .jit import Kernel
from .pack import PackedWeights

MOST_PAIRS = 32
_WARPS, _PIECE_BYTES, _MOST_STAGES = 8, 2048, 12
_SHARED_BYTES = 227 * 1024 - 512  # of a CTA, but for what is small


def new_state(device: torch.device) -> torch.Tensor:
    """What a launch counts in and leaves as it was; not for two launches at once."""
    return torch.zeros(4 + MOST_PAIRS, dtype=torch.int32, device=device)


def takes(num_pairs: int, hidden_size: int, intermediate_size: int) -> bool:
    return 0 < num_pairs <= MOST_PAIRS and _stages(hidden_size, intermediate_size) > 0


def thin_experts(
    x: torch.Tensor,  # [1, hidden] bf16
    ids: torch.Tensor,  # [1, top_k] int32, as of `route`
    weights: PackedWeights,
    state: torch.Tensor,
    out: torch.Tensor,
    *,
    expert_map: torch.Tensor | None = None,
    work: LayerWork | None = None,
) -> None:
    """Write `out` [1, top_k, hidden] bf16 for every local pair; other rows are left as they are."""
    pairs, hidden, intermediate = ids.numel(), weights.hidden_size, weights.intermediate_size
    h = torch.empty(pairs, intermediate, dtype=torch.bfloat16, device=x.device)
    stages = _stages(hidden, intermediate)
    thin_experts_kernel(hidden, intermediate, weights.num_local_experts).launch(
        (torch.cuda.get_device_properties(x.device).multi_processor_count,),
        32 * _WARPS,
        (
            weights.w13,
            weights.w2,
            x,
            ids,
            np.int32(pairs),
            expert_map,
            np.int32(0 if expert_map is None else expert_map.numel()),
            h,
            out,
            state,
            work and work.clock,
            work and work.rows,
        ),
        device=x.device,
        shared_bytes=_WARPS * stages * _PIECE_BYTES,
    )


def _stages(hidden: int, intermediate: int) -> int:
    """Pieces of a warp's ring: what fits beside the rows, and no more than a group has."""
    room = _SHARED_BYTES - 2 * hidden - _WARPS * 2 * intermediate
    return min(_MOST_STAGES, room // (_WARPS * _PIECE_BYTES), hidden // 64, intermediate // 64)


@functools.cache
def thin_experts_kernel(hidden: int, intermediate: int, num_local_experts: int) -> Kernel:
    defines = {"HIDDEN": hidden, "INTERMEDIATE": intermediate, "NUM_EXPERTS": num_local_experts}
    return Kernel("thin_experts.cu", "thin_experts", {**defines, "STAGES": _stages(hidden, intermediate)})
