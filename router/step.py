"""One step on one rank: each MoE layer's turn, from plan to weighted sum. Given by `Mesh.enter`."""

from collections.abc import Callable
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
from .placement import Placement


class Step:
    """The StepContext of `contracts.py`. `on_done(error)` is called once: after the last MoE layer's turn, or with what
    ended the step before."""

    __slots__ = (
        "_exchange",
        "_experts",
        "_load",
        "_next_turn",
        "_num_tokens",
        "_on_done",
        "_placement",
        "_rank",
        "_shape",
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
    ) -> None:
        self.header = header
        self.exchange_s = 0.0
        self.expert_s = 0.0
        self._rank, self._num_tokens = rank, header.num_tokens[rank]
        self._placement, self._exchange, self._experts, self._shape = placement, exchange, experts, shape
        self._load, self._on_done = load, on_done
        self._next_turn = 0  # index into placement.moe_layers
        if placement.moe_layers:
            exchange.begin(header, placement.moe_layers)
        else:
            on_done(None)

    def moe(self, layer_id: int, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > self._num_tokens:
            self._fail_and_raise(f"{x.shape[0]} tokens in layer {layer_id}, {self._num_tokens} are allowed")
        source_plan = plan(topk_ids, self._placement, layer_id, self._rank)
        return weighted_sum(self._take_turn(layer_id, source_plan, x), source_plan, topk_weights)

    def serve(self) -> None:
        """A rank without tokens; also a named source whose work has gone: it sends no rows, but takes its turns."""
        x: torch.Tensor | None = None
        no_ids = torch.empty(0, self._shape.top_k, dtype=torch.int32)
        if self._num_tokens:
            x = torch.empty(0, self._shape.hidden_size, dtype=self._shape.dtype)
        while self._next_turn < len(self._placement.moe_layers):
            layer_id = self._placement.moe_layers[self._next_turn]
            self._take_turn(layer_id, None if x is None else plan(no_ids, self._placement, layer_id), x)

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
            self._on_done(None)
        return expert_rows if returned is None else returned

    def _multiply(self, handle: ExchangeHandle) -> torch.Tensor:
        if self._experts is None or handle.rows.shape[0] == 0:
            return handle.rows[:0]
        if self._load is not None:
            counts = np.bincount(handle.slot_ids.numpy().ravel() + 1, minlength=self._load.shape[1] + 1)
            self._load[handle.layer_id] += counts[1:]
        return self._experts.forward(handle.layer_id, handle.rows, handle.slot_ids)

    def _fail(self, error: BaseException) -> None:
        self._next_turn = len(self._placement.moe_layers)
        if not isinstance(error, ExchangeError):
            self._exchange.abort()  # ours alone: without this the peers would wait for their deadline
        self._on_done(error)
