"""One step on one GPU rank: the StepContext whose rows never leave the device.

Turns are enqueued, eagerly or while a CUDA graph is being captured, and nothing waits in between: what went wrong is
known when the device is done (`finish`). So a step has two ends. *Launched*: all its turns are in the stream; the
leader may name the next one, which queues up behind it. *Finished*: the exchange's verdict was good, the engine may
commit. What was launched after a step that failed fails too, since the exchange is spent; after a bad row the engine
runs the same batch again, and what ran ahead of that is void too."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import NoReturn, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..errors import EpochError, ExchangeError
from ..kernels import reference
from ..kernels.combine import combine
from .contracts import LocalExperts
from .device_exchange import DeviceExchange, Verdict
from .epoch import StepHeader
from .exchange import RowShape
from .guard import BadRow, Guard
from .placement import Placement


class DeviceExperts(LocalExperts, Protocol):
    """Experts whose `forward` takes slot ids on the device."""

    @property
    def capturable(self) -> bool:
        """`forward` may stand in a CUDA graph."""
        ...

    @property
    def graph_version(self) -> int:
        """Changes when graphs captured with `forward` in them hold no longer."""
        ...

    def rows_per_slot(self, version: int) -> npt.NDArray[np.int64]:
        """[num_layers, num_slots] rows computed since this placement version came into use; zeros before and after.
        From any thread, and without a wait for what is enqueued."""
        ...


class DeviceStep:
    """`on_launched` is called once, when all turns are enqueued; `on_done(error)` once, from `finish` or with what
    ended the step before. All in the engine's thread."""

    def __init__(
        self,
        header: StepHeader,
        *,
        rank: int,
        placement: Placement,
        exchange: DeviceExchange,
        experts: DeviceExperts | None,
        shape: RowShape,
        on_launched: Callable[[], None] = lambda: None,
        on_done: Callable[[BaseException | None], None] = lambda error: None,
        guard: Guard | None = None,
        shard_ids: Sequence[str] = (),  # member id by ep_rank
    ) -> None:
        self.header = header
        self.exchange_s = self.expert_s = 0.0  # no event stands in a step: the experts sum their time on the device
        self._rank, self._placement, self._exchange, self._experts = rank, placement, exchange, experts
        self._shape, self._on_launched, self._on_done = shape, on_launched, on_done
        self._guard, self._shard_ids = guard or Guard(), shard_ids
        most = max(header.num_tokens, default=0)
        self._most = max(most, header.bucket)  # rows of the largest source
        capacity = exchange.capacity or max(self._most, 1)
        self.stride = header.bucket if 0 < header.bucket <= capacity else min(self._most, capacity)
        self._num_parts = -(-self._most // self.stride) if self.stride else 1
        self._layers = placement.moe_layers
        self._next_turn = 0
        self._launched = self._done = False
        self._num_failures = self._guard.num_replays  # before this step
        self._graph_key = self._key()
        if not self._layers:
            self._launch()
            return
        try:
            exchange.begin(header, stride=self.stride, attempt=self._guard.attempt)
        except ExchangeError as error:
            self._conclude(error)
            raise

    # -- what a model calls

    def moe(self, layer_id: int, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Expert half of one layer: x [T, hidden], topk_ids [T, top_k] int32, topk_weights float32 -> [T, hidden]."""
        self._begin_turn(layer_id, x.shape[0])
        out = torch.empty_like(x)
        for part in self._parts(x.shape[0]):
            y = self._exchange_rows(layer_id, x[part], topk_ids[part])
            _weighted_sum(y, topk_ids[part], topk_weights[part], out[part])
        self._end_turn()
        return out

    def rows(self, layer_id: int, x: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """The unweighted rows [T, top_k, hidden], valid until the next layer's; pairs of -1 hold nothing of meaning."""
        self._begin_turn(layer_id, x.shape[0])
        parts = self._parts(x.shape[0])
        if len(parts) == 1:
            y = self._exchange_rows(layer_id, x, topk_ids)
        else:
            y = x.new_empty(*topk_ids.shape, x.shape[1])
            for part in parts:
                y[part] = self._exchange_rows(layer_id, x[part], topk_ids[part])
        self._end_turn()
        return y

    def serve(self) -> None:
        """A rank without tokens, or a named source whose work has gone: it takes every turn, to the step's end."""
        self.take_turns()
        self.settle()

    def take_turns(self) -> None:
        """Enqueue all turns left without rows of our own, by a captured graph where there is one; capturable itself."""
        alone = not self._exchange.capacity  # nothing to take
        if alone or self._next_turn or self._launched or _capturing(self._shape.device):
            self._take_turns()
            return
        new = self._exchange.serve_graphs.run(self._serve_key(), self._take_turns, self._shape.device)
        if new is not None:
            self.captured(new)
        if not self._launched:
            self.replayed()

    def _serve_key(self) -> Hashable | None:
        key = self.graph_key
        return None if key is None else (key, self.header.num_tokens[self._rank] > 0)

    def _take_turns(self) -> None:
        x, ids = None, None
        if self.header.num_tokens[self._rank]:
            device = self._shape.device
            x = torch.empty(0, self._shape.hidden_size, dtype=self._shape.dtype, device=device)
            ids = torch.empty(0, self._shape.top_k, dtype=torch.int32, device=device)
        for layer_id in self._layers[self._next_turn :]:
            self._begin_turn(layer_id, 0)
            for _ in range(self._num_parts):
                self._exchange_rows(layer_id, x, ids)
            self._end_turn()

    # -- graphs

    @property
    def graph_key(self) -> Hashable | None:
        """A graph captured in a step may be replayed in one of the same key; None = nothing of this step may be
        captured."""
        return self._graph_key

    def captured(self, graph: torch.cuda.CUDAGraph) -> None:
        """A graph that holds turns of this step was captured: it is reset should the exchange break."""
        self._exchange.hold(graph)

    def replayed(self) -> None:
        """A captured graph that holds all turns of this step was launched."""
        self._next_turn = len(self._layers)
        if self._layers:
            self._exchange.end()
        self._launch()

    def _key(self) -> Hashable | None:
        if self._num_parts != 1 or (self._experts is not None and not self._experts.capturable):
            return None
        exchange_key = self._exchange.graph_key(self.header)
        version = 0 if self._experts is None else self._experts.graph_version
        stride = self.stride if self._exchange.capacity else 0  # without other ranks nothing depends on it
        return None if exchange_key is None else (exchange_key, version, stride)

    # -- ends

    def is_over(self, event: torch.cuda.Event) -> bool:
        """`wait` for this event behind the step would return, or raise, at once."""
        return self._exchange.is_over(event)

    def wait(self, event: torch.cuda.Event) -> None:
        """Until the device has reached `event`, recorded behind this step; raises ExchangeError where it never will."""
        try:
            self._exchange.wait(event)
        except ExchangeError as error:
            self._conclude(error)
            raise

    def finish(self) -> None:
        """The device has done all of the step: raises what went wrong, else the step is done. Idempotent."""
        if self._done:
            return
        if not self._launched:
            self._fail(f"finished after {self._next_turn} of {len(self._layers)} turns")
        try:
            verdict = self._exchange.verdict() if self._layers else Verdict()
        except ExchangeError as error:
            self._conclude(error)
            raise
        self._conclude(None)
        if self._num_failures != self._guard.num_replays:
            return  # launched behind a step that turned out void: so is this one, whatever its rows are
        step_id, epoch = self.header.step_id, self.header.epoch
        if verdict.overflow >= 0:
            raise self._guard.overflowed(layer_id=verdict.overflow, step_id=step_id, epoch=epoch)
        bad = [self._named(row) for row in verdict.bad]
        if bad and not self._guard.accepts_non_finite:
            raise self._guard.failed(bad, step_id=step_id, epoch=epoch)
        self._guard.passed()

    def settle(self) -> None:
        """Wait for all of the step, then `finish`: for who does not run ahead."""
        if self._shape.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self.wait(event)
        self.finish()

    def close(self) -> None:
        """A step given up halfway would leave its peers waiting: end it for them too."""
        if not self._launched and not self._done:
            self._exchange.abort()
            self._conclude(EpochError(f"step {self.header.step_id} was left before its last layer"))

    def _named(self, row: BadRow) -> BadRow:
        return replace(row, shard=self._shard_ids[row.ep_rank] if self._shard_ids and row.ep_rank >= 0 else "")

    def _conclude(self, error: BaseException | None) -> None:
        self._next_turn, self._done = len(self._layers), True
        self._on_done(error)

    def _launch(self) -> None:
        if not self._launched:
            self._launched = True
            self._on_launched()

    # -- turns

    def _begin_turn(self, layer_id: int, num_rows: int) -> None:
        if num_rows > self._most:
            self._fail(f"{num_rows} rows in layer {layer_id}, {self._most} are allowed")
        if layer_id == self._layers[0] and _capturing(self._shape.device):
            self._next_turn = 0
        if self._next_turn >= len(self._layers) or self._layers[self._next_turn] != layer_id:
            self._fail(f"layer {layer_id} out of turn")

    def _end_turn(self) -> None:
        self._next_turn += 1
        if self._next_turn == len(self._layers) and not _capturing(self._shape.device):
            self._exchange.end()
            self._launch()

    def _parts(self, num_rows: int) -> list[slice]:
        """As many on every rank, by the header alone."""
        if self._num_parts == 1:
            return [slice(None)]
        ends = [min(num_rows, (i + 1) * self.stride) for i in range(self._num_parts)]
        return [slice(min(num_rows, i * self.stride), end) for i, end in enumerate(ends)]

    def _exchange_rows(self, layer_id: int, x: torch.Tensor | None, topk_ids: torch.Tensor | None) -> torch.Tensor:
        try:
            rows, slot_ids = self._exchange.dispatch(layer_id, x, topk_ids, self.stride)
            returned = self._exchange.combine(self._multiply(layer_id, rows, slot_ids))
        except BaseException as error:
            if not _capturing(self._shape.device):
                self._exchange.abort()
                self._conclude(error)
            raise
        return rows if returned is None else returned

    def _multiply(self, layer_id: int, rows: torch.Tensor, slot_ids: torch.Tensor) -> torch.Tensor:
        if self._experts is None or not rows.shape[0]:
            return rows.new_empty(0, self._shape.top_k, self._shape.hidden_size)
        out = self._experts.forward(layer_id, rows, slot_ids)
        if out.dim() == 3:
            return out
        spread = out.new_zeros(slot_ids.numel(), out.shape[1])  # no kernels: only the pairs that have an expert
        spread[slot_ids.flatten() >= 0] = out
        return spread.view(*slot_ids.shape, out.shape[1])

    def _fail(self, message: str) -> NoReturn:
        error = EpochError(f"step {self.header.step_id}: {message}")
        if not self._done:
            self._exchange.abort()
            self._conclude(error)
        raise error


def _weighted_sum(y: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor) -> None:
    """Into `out` [T, hidden]: each token's rows [T, top_k, hidden], weighted, in topk order in float32."""
    if y.is_cuda and y.dtype == torch.bfloat16 and y.shape[2] % 8 == 0:
        combine(y, topk_ids, topk_weights, out=out)
    else:
        out.copy_(reference.combine(y, topk_ids, topk_weights))


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
