"""Weighted sum of each row's top_k outputs, float32, in k order: the order is what makes the result independent of
placement."""

import functools

import numpy as np
import torch

from .jit import Kernel
from .permute import check_ids


def combine(
    y: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    num_local_experts: int | None = None,
    expert_map: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`y` [num_rows, top_k, hidden] bf16, `ids` as given to the expert layer, `weights` [num_rows, top_k] float32
    -> [num_rows, hidden] bf16. Pairs whose id is not local are skipped, whatever `y` holds there."""
    check_ids(ids, expert_map)
    num_rows, top_k, hidden = y.shape
    out = torch.empty(num_rows, hidden, dtype=torch.bfloat16, device=y.device) if out is None else out
    if num_rows:
        combine_kernel(hidden, top_k).launch(
            (num_rows, -(-hidden // 1024)),
            128,
            (
                y,
                ids,
                expert_map,
                np.int32(0 if expert_map is None else expert_map.numel()),
                np.int32(num_local_experts if num_local_experts is not None else 2**31 - 1),
                weights,
                out,
            ),
            device=y.device,
        )
    return out


@functools.cache
def combine_kernel(hidden: int, top_k: int) -> Kernel:
    return Kernel("combine.cu", "combine", {"HIDDEN": hidden, "TOP_K": top_k})
