"""Plan which rows go to which expert rank. Pure; `exchange.py` moves the bytes.

Why: both sides of an all-to-all must agree on counts first, so they are decided once, here. A token goes once to each
rank that needs it, with its local slot ids there; every (token, k) comes back as one row.
Order is rank-major, then token-major: what goes to one rank is one run of rows, and so is what comes back.
NumPy, because a decode step plans a few tokens in every layer and a torch call costs more than the work.
Idea: the layout step and the dispatch/combine handle of DeepEP."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .placement import Int32Array, Placement

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class DispatchPlan:
    """One MoE layer of one step on one source; spent by one dispatch and one combine.

    A *row* is a token sent to one rank; a *pair* is one (token, k) whose product comes back."""

    layer_id: int
    num_tokens: int
    top_k: int
    send_counts: list[int]  # [ep_size] rows to each rank
    pair_counts: list[int]  # [ep_size] rows that come back from each rank
    row_to_token: Int64Array  # [num_rows] source token of each row
    row_slot_ids: Int32Array  # [num_rows, top_k] local slot on the receiving rank, -1 none
    return_slots: Int64Array  # [num_pairs] token * top_k + k of each pair that comes back

    @property
    def num_rows(self) -> int:
        return len(self.row_to_token)

    @property
    def num_pairs(self) -> int:
        return len(self.return_slots)


def plan(topk_ids: torch.Tensor, placement: Placement, layer_id: int, source_rank: int = 0) -> DispatchPlan:
    """topk_ids [num_tokens, top_k] int32 logical experts of this source, -1 none.

    Among copies the token's index (shifted by the source's rank, so that sources differ) decides."""
    ids = topk_ids.numpy()
    num_tokens, top_k = ids.shape
    key = np.arange(source_rank, source_rank + num_tokens)
    physical = placement.map_ids(layer_id, ids, key)
    if placement.ep_size == 1:
        return _single_rank(layer_id, physical)
    slots, ep_size = placement.slots_per_rank, placement.ep_size
    # Physical -1 gives rank -1, which indexes the extra last row: a token without experts needs no rank.
    needs = np.zeros((ep_size + 1, num_tokens), dtype=np.bool_)
    needs[physical // slots, np.arange(num_tokens)[:, None]] = True
    row_rank, row_to_token = needs[:ep_size].nonzero()
    slot_ids = physical[row_to_token] - (row_rank * slots).astype(np.int32)[:, None]
    elsewhere = slot_ids.view(np.uint32) >= slots  # another rank's, or -1: negative reads as a large unsigned number
    slot_ids[elsewhere] = -1
    pair_row, pair_k = (~elsewhere).nonzero()
    return DispatchPlan(
        layer_id,
        num_tokens,
        top_k,
        np.bincount(row_rank, minlength=ep_size).tolist(),
        np.bincount(row_rank[pair_row], minlength=ep_size).tolist(),
        row_to_token,
        slot_ids,
        row_to_token[pair_row] * top_k + pair_k,
    )


def _single_rank(layer_id: int, physical: Int32Array) -> DispatchPlan:
    """One expert rank: a slot is the physical id. Every token is sent, in order, so the rows are the batch itself."""
    num_tokens, top_k = physical.shape
    return_slots = (physical.reshape(-1) >= 0).nonzero()[0]
    return DispatchPlan(
        layer_id,
        num_tokens,
        top_k,
        [num_tokens],
        [len(return_slots)],
        np.arange(num_tokens),
        physical,
        return_slots,
    )
