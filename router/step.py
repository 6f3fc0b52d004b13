"""One step on one rank: each MoE layer's turn, from plan to weighted sum. Given by `Mesh.enter`.

A source's rows are checked before anything of the step is committed (`guard.py`). Bad ones end it with a GuardError
from its last `moe`, after every turn was taken: nobody else notices, and the same batch runs again with the next
header, in the same epoch, with other copies of the experts where there are some. A row that is not finite is noticed in
its own layer, and the turns left are taken without rows."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch

from ..errors import EpochError, ExchangeError
from .contracts import LocalExperts
from .dispatch import DispatchPlan, plan
from .epoch import StepHeader
from .exchange import Exchange, ExchangeHandle, RowShape, weighted_sum
from .guard import BadRow, Direction, Fault, Guard, all_finite, non_finite_rows
from .placement import Placement


class Step:
    """The StepContext of `contracts.py`. `on_done(error)` is called once: after the last MoE layer's turn, or with what
    ended the step before."""

    __slots__ = (
        "_bad",
        "_exchange",
        "_experts",
        "_guard",
        "_load",
        "_next_turn",
        "_num_tokens",
        "_on_done",
        "_placement",
        "_plans",
        "_rank",
        "_shape",
        "_shard_ids",
        "exchange_s",
        "expert_s",
        "header",
    )

    def __init__(
        self,
        header: StepHeader,
        *,
        rank: int,
        placement: Placement,
        exchange: Exchange,
        experts: LocalExperts | None,
        shape: RowShape,
        load: npt.NDArray[np.int64] | None,  # [num_layers, slots_per_rank] rows so far, added to
        on_done: Callable[[BaseException | None], None],
        guard: Guard | None = None,
        shard_ids: Sequence[str] = (),  # member id by ep_rank
    ) -> None:
        self.header = header
        self.exchange_s = 0.0
        self.expert_s = 0.0
        self._rank, self._num_tokens = rank, header.num_tokens[rank]
        self._placement, self._exchange, self._experts, self._shape = placement, exchange, experts, shape
        self._load, self._on_done = load, on_done
        self._guard, self._shard_ids = guard or Guard(), shard_ids
        self._plans: dict[int, DispatchPlan] = {}  # by layer, of this source
        self._bad: list[BadRow] = []
        self._next_turn = 0  # index into placement.moe_layers
        if placement.moe_layers:
            exchange.begin(header, placement.moe_layers)
        else:
            on_done(None)

    def moe(self, layer_id: int, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > self._num_tokens:
            self._fail_and_raise(f"{x.shape[0]} tokens in layer {layer_id}, {self._num_tokens} are allowed")
        source_plan = plan(topk_ids, self._placement, layer_id, self._rank + self._guard.attempt)
        self._plans[layer_id] = source_plan
        pairs = self._take_turn(layer_id, source_plan, x)
        out = weighted_sum(pairs, source_plan, topk_weights)
        if not all_finite(out) and not self._guard.accepts_non_finite:
            found = self._not_finite(source_plan, x, pairs)
            if found:  # else finite rows have too large a sum: the model's own
                self._bad += found
                self.serve()
        if self._next_turn == len(self._placement.moe_layers):
            self._conclude()
        return out

    def serve(self) -> None:
        """A rank without tokens; also a named source whose work has gone: it sends no rows, but takes its turns."""
        x: torch.Tensor | None = None
        no_ids = torch.empty(0, self._shape.top_k, dtype=torch.int32)
        if self._num_tokens:
            x = torch.empty(0, self._shape.hidden_size, dtype=self._shape.dtype)
        while self._next_turn < len(self._placement.moe_layers):
            layer_id = self._placement.moe_layers[self._next_turn]
            self._take_turn(layer_id, None if x is None else plan(no_ids, self._placement, layer_id), x)

    def finish(self) -> None:
        """Every turn was judged when it was taken."""

    def _not_finite(self, source_plan: DispatchPlan, x: torch.Tensor, pairs: torch.Tensor) -> list[BadRow]:
        """The pairs that came back so, unless their token's row was so already: then that row."""
        layer_id, bad, first_pair, first_row = source_plan.layer_id, [], 0, 0
        sick = set(non_finite_rows(x))
        for ep_rank, (num_pairs, num_rows) in enumerate(
            zip(source_plan.pair_counts, source_plan.send_counts, strict=True)
        ):
            tokens = source_plan.row_to_token[first_row : first_row + num_rows].tolist()
            came_sick = [row for row, token in enumerate(tokens) if token in sick]
            bad += [self._bad_row(Direction.DISPATCH, ep_rank, layer_id, row) for row in came_sick]
            for pair in non_finite_rows(pairs[first_pair : first_pair + num_pairs]):
                if source_plan.return_slots[first_pair + pair] // source_plan.top_k not in sick:
                    bad.append(self._bad_row(Direction.RETURN, ep_rank, layer_id, pair))
            first_pair, first_row = first_pair + num_pairs, first_row + num_rows
        return bad

    def _bad_row(self, direction: Direction, ep_rank: int, layer_id: int, row: int) -> BadRow:
        shard = self._shard_ids[ep_rank] if self._shard_ids else ""
        return BadRow(
            fault=Fault.NOT_FINITE,
            direction=direction,
            source=self._rank,
            ep_rank=ep_rank,
            layer_id=layer_id,
            row=row,
            shard=shard,
        )

    def _conclude(self) -> None:
        """All turns are taken and all rows judged: GuardError if any was bad."""
        mine = self._bad
        damaged = [row for row in mine if row.fault is not Fault.NOT_FINITE]
        if damaged:  # what is not finite from there on follows from it
            first = min(map(self._placement.moe_layers.index, {row.layer_id for row in damaged}))
            mine = damaged + [
                row
                for row in mine
                if row.fault is Fault.NOT_FINITE and self._placement.moe_layers.index(row.layer_id) < first
            ]
        elif self._guard.accepts_non_finite:
            mine = []
        if not mine:
            self._guard.passed()
            return
        named = [replace(row, experts=self._experts_of(row)) for row in dict.fromkeys(mine)]
        raise self._guard.failed(named, step_id=self.header.step_id, epoch=self.header.epoch)

    def _experts_of(self, bad: BadRow) -> tuple[int, ...]:
        """The logical experts that a row of this source was sent to, or the one whose product came back."""
        source_plan = self._plans.get(bad.layer_id)
        if source_plan is None or bad.row < 0:
            return ()
        first_row = sum(source_plan.send_counts[: bad.ep_rank])
        slots = source_plan.row_slot_ids[first_row : first_row + source_plan.send_counts[bad.ep_rank]]
        ids = slots[bad.row] if bad.direction is Direction.DISPATCH else slots.reshape(-1)[slots.reshape(-1) >= 0]
        held = self._placement.local_slots(bad.layer_id, bad.ep_rank).tolist()
        if bad.direction is Direction.RETURN:
            return (int(held[int(ids[bad.row])]),)
        return tuple(int(held[slot]) for slot in ids.tolist() if slot >= 0)

    def close(self) -> None:
        """A step given up halfway would leave its peers waiting: end it for them too."""
        if self._next_turn < len(self._placement.moe_layers):
            self._fail(EpochError(f"step {self.header.step_id} was left before its last layer"))

    def _fail_and_raise(self, message: str) -> NoReturn:
        error = EpochError(f"step {self.header.step_id}: {message}")
        if self._next_turn < len(self._placement.moe_layers):
            self._fail(error)
        raise error

    def _take_turn(self, layer_id: int, source_plan: DispatchPlan | None, x: torch.Tensor | None) -> torch.Tensor:
        layers = self._placement.moe_layers
        if self._next_turn >= len(layers) or layers[self._next_turn] != layer_id:
            self._fail_and_raise(f"layer {layer_id} out of turn")
        try:
            started = perf_counter()
            handle = self._exchange.dispatch(layer_id, source_plan, x)
            received = perf_counter()
            expert_rows = self._multiply(handle)
            computed = perf_counter()
            returned = self._exchange.combine(expert_rows, handle)
            self.exchange_s += received - started + perf_counter() - computed
            self.expert_s += computed - received
        except BaseException as error:
            self._fail(error)
            raise
        self._next_turn += 1
        if self._next_turn == len(layers):
            self._verify()
            self._on_done(None)
        return expert_rows if returned is None else returned

    def _verify(self) -> None:
        try:
            started = perf_counter()
            found = self._exchange.verify()
            self.exchange_s += perf_counter() - started
        except BaseException as error:
            self._fail(error)
            raise
        self._bad += [row for row in found if row.source == self._rank]
        self._guard.seen([row for row in found if row.source != self._rank])

    def _multiply(self, handle: ExchangeHandle) -> torch.Tensor:
        if self._experts is None or handle.rows.shape[0] == 0:
            return handle.rows[:0]
        if self._load is not None:
            counts = np.bincount(handle.slot_ids.numpy().ravel() + 1, minlength=self._load.shape[1] + 1)
            self._load[handle.layer_id] += counts[1:]
        products = self._experts.forward(handle.layer_id, handle.rows, handle.slot_ids)
        if not all_finite(products) and all_finite(handle.rows) and self._guard.heal(handle.layer_id):
            return self._experts.forward(handle.layer_id, handle.rows, handle.slot_ids)
        return products

    def _fail(self, error: BaseException) -> None:
        self._next_turn = len(self._placement.moe_layers)
        if not isinstance(error, ExchangeError):
            self._exchange.abort()  # ours alone: without this the peers would wait for their deadline
        self._on_done(error)
