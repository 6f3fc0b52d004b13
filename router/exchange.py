"""Move rows between the ranks of a step: dispatch to the experts' owners, combine back. One interface, several back
ends.

`local` (here): one process owns both roles, nothing moves. `gloo` (exchange_gloo.py): CPU processes.
Every rank that a header names calls `begin(header, layers)` once, then for each MoE layer in order
`dispatch(layer_id, plan, x) -> handle` and `combine(expert_rows, handle) -> rows`. Only pairs (source, expert rank)
that the header names exchange anything. Rows come back one per (token, k), unweighted and in the activation's dtype:
the attention side weights and sums them in topk order, which is what makes the result independent of placement. After
the last layer every rank calls `verify() -> bad rows` once: nothing of the step is committed before, so what was wrong
in any layer, either way, may be told at the end (`guard.py`: which checks, and what follows). After an ExchangeError
the exchange is spent: `abort` it and build the next epoch's. Idea: DeepEP's dispatch and combine, a pair bound by the
handle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from .dispatch import DispatchPlan
from .epoch import StepHeader
from .guard import BadRow


@dataclass(frozen=True, slots=True, kw_only=True)
class RowShape:
    """What one row is, the same on every rank, from the checkpoint; and where it lives on this one."""

    hidden_size: int
    top_k: int
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")  # noqa: RUF009


@dataclass(slots=True)
class ExchangeHandle:
    """What one dispatch left to its combine: the rows that this rank must multiply, and whence they came."""

    layer_id: int
    plan: DispatchPlan | None  # None = this rank is no source
    rows: torch.Tensor  # [num_received, hidden], sources in rank order
    slot_ids: torch.Tensor  # [num_received, top_k] int32 local slots, -1 none
    source_counts: Sequence[tuple[int, int, int]] = ()  # (source rank, rows, pairs) in the order of `rows`


class Exchange(Protocol):
    """One membership's way to move rows. Called from the engine (or serving) thread alone, `abort` from any."""

    def begin(self, header: StepHeader, layers: Sequence[int]) -> None:
        """Open a step: `layers` are the MoE layers in the order in which they will be exchanged."""
        ...

    def dispatch(self, layer_id: int, plan: DispatchPlan | None, x: torch.Tensor | None) -> ExchangeHandle:
        """x [num_tokens, hidden] and its plan on a source, None elsewhere. Returns the rows for this rank's experts."""
        ...

    def combine(self, expert_rows: torch.Tensor, handle: ExchangeHandle) -> torch.Tensor | None:
        """expert_rows [pairs received, hidden] in (row, k) order -> [plan.num_pairs, hidden] in plan order on a
        source."""
        ...

    def verify(self) -> list[BadRow]:
        """After the last layer: the bad ones among this rank's rows, and those of other sources (`BadRow.source`) that
        it received."""
        ...

    def abort(self) -> None:
        """Give up at once: own waits and the peers' end with an error. Idempotent."""
        ...


class LocalExchange:
    """One process owns both roles: rows go in and out without a copy."""

    def begin(self, header: StepHeader, layers: Sequence[int]) -> None:
        pass

    def dispatch(self, layer_id: int, plan: DispatchPlan | None, x: torch.Tensor | None) -> ExchangeHandle:
        assert plan is not None
        assert x is not None
        counts = ((0, plan.num_rows, plan.num_pairs),)
        return ExchangeHandle(layer_id, plan, x, torch.from_numpy(plan.row_slot_ids), counts)

    def combine(self, expert_rows: torch.Tensor, handle: ExchangeHandle) -> torch.Tensor | None:
        return expert_rows

    def verify(self) -> list[BadRow]:
        return []  # nothing was moved

    def abort(self) -> None:
        pass


def weighted_sum(pairs: torch.Tensor, plan: DispatchPlan, topk_weights: torch.Tensor) -> torch.Tensor:
    """[num_pairs, hidden] of one source -> [num_tokens, hidden]: float32 sum over k in topk order, then pairs' dtype.

    A token's sum reads its own rows alone, in a fixed order, so its bits depend neither on the batch nor on where the
    rows were computed. Chunks keep the float32 products in cache."""
    num_tokens, top_k, hidden = plan.num_tokens, plan.top_k, pairs.shape[1]
    weights = topk_weights.unsqueeze(-1)
    order = None  # where each (token, k) is in `pairs`; None = in place
    if plan.num_pairs != num_tokens * top_k:
        rows = pairs.new_zeros(num_tokens * top_k, hidden)
        rows[torch.from_numpy(plan.return_slots)] = pairs
    else:
        rows = pairs
        if len(plan.send_counts) > 1:
            inverse = np.empty(plan.num_pairs, dtype=np.int64)
            inverse[plan.return_slots] = np.arange(plan.num_pairs)
            order = torch.from_numpy(inverse)
    chunk = max(1, _CHUNK_ELEMENTS // max(1, top_k * hidden))
    if num_tokens <= chunk:
        gathered = rows if order is None else rows.index_select(0, order)
        return (gathered.view(num_tokens, top_k, hidden) * weights).sum(dim=1).to(pairs.dtype)
    out = torch.empty(num_tokens, hidden, dtype=pairs.dtype)
    for start in range(0, num_tokens, chunk):
        end = min(num_tokens, start + chunk)
        pairs_of = slice(start * top_k, end * top_k)
        gathered = rows[pairs_of] if order is None else rows.index_select(0, order[pairs_of])
        out[start:end] = (gathered.view(end - start, top_k, hidden) * weights[start:end]).sum(dim=1)
    return out


_CHUNK_ELEMENTS = 1 << 19  # float32 products of a chunk: 2 MB
