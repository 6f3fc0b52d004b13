"""The exchange of GPUs: rows and ids stay on the device, nothing is planned on the host. One interface, several back
ends.

`local` (here): one process owns both roles. `peer` (exchange_peer.py): GPUs of one host write into each other's
memory. `nccl` (exchange_nccl.py): anywhere. Why another interface than `exchange.py`: a host plan costs a sync in every
layer and cannot stand in a CUDA graph. So shapes are fixed by the header alone (`stride` rows a source, the same on all
ranks), tokens without an expert here are rows whose slots are all -1, and which copy of an expert a token goes to is
read from a table in device memory: a rebalance writes that table and changes no address and no graph.

Every rank that a header names calls `begin` once, then for each turn (a MoE layer, or a part of its tokens where they
are more than `capacity`) `dispatch` and `combine`, then `end`; all enqueue on torch's current stream and none waits.
When the device is done with the step, `verdict` tells what became of it. After an ExchangeError the exchange is spent.
Idea: the low-latency kernels of DeepEP."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .epoch import StepHeader
from .guard import BadRow, Direction, Fault
from .placement import Placement

_serials = itertools.count(1)
NO_BAD_ROW = (1 << 63) - 1
SLOW_STEPS = 16  # of an exchange, in which a rank may still compile kernels while others wait for its rows


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one step on this rank: the bad rows among its tokens, as far as they were seen (the first of each shard), and
    the first layer in which answers had no place (-1 none), from where on its rows mean nothing."""

    bad: tuple[BadRow, ...] = ()
    overflow: int = -1


class ServeGraphs:
    """Captured turns of a rank without tokens, by key; they end with their exchange."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}  # None = was run eagerly once
        self._pool: Any = None  # of memory; no two of them run at the same time

    def run(
        self, key: Hashable | None, take_turns: Callable[[], None], device: torch.device
    ) -> torch.cuda.CUDAGraph | None:
        """Take the turns: eagerly the first time, which loads what a capture may not load; then by a graph. Returns the
        graph that was captured just now, if any."""
        if key is None or device.type != "cuda" or key not in self._graphs:
            take_turns()
            if key is not None:
                self._graphs[key] = None
            return None
        graph, new = self._graphs[key], None
        if graph is None:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = new = self._graphs[key] = _capture(take_turns, device, self._pool)
        graph.replay()
        return new


def _capture(work: Callable[[], None], device: torch.device, pool: Any) -> torch.cuda.CUDAGraph:
    """Without torch.cuda.graph's collection of garbage: peers wait meanwhile."""
    graph, stream, current = torch.cuda.CUDAGraph(), torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    current.wait_stream(stream)
    return graph


class DeviceExchange(ABC):
    """One membership's way to move rows between GPUs. Engine thread alone, `abort` and `lose` from any."""

    capacity: int  # most rows that a source sends in one turn; 0 = any number

    def __init__(self) -> None:
        self.serial = next(_serials)  # addresses are this object's own
        self.serve_graphs = ServeGraphs()

    @abstractmethod
    def use_placement(self, placement: Placement) -> None:
        """From the next `begin` on this table counts. Between steps; enqueued on the current stream."""

    @abstractmethod
    def begin(self, header: StepHeader, *, stride: int, attempt: int) -> None:
        """Open a step in which every source's turn has `stride` rows. `attempt` shifts the choice among copies."""

    @abstractmethod
    def dispatch(
        self, layer_id: int, x: torch.Tensor | None, topk_ids: torch.Tensor | None, stride: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, hidden], T <= stride, and topk_ids [T, top_k] int32 logical on a source, None elsewhere. Returns the
        rows for this rank's experts [R, hidden] and their local slots [R, top_k] int32, -1 none. R depends on `stride`
        alone; what stands in rows without a slot means nothing."""

    @abstractmethod
    def combine(self, expert_rows: torch.Tensor) -> torch.Tensor | None:
        """expert_rows [R, top_k, hidden] of the last `dispatch` -> y [T, top_k, hidden] on a source: unweighted, valid
        until the next `dispatch`; pairs of -1 hold nothing of meaning."""

    @abstractmethod
    def end(self) -> None:
        """After the last turn: what `verdict` reads is on its way to the host."""

    def verdict(self) -> Verdict:
        """The device has done all of the step. Raises ExchangeError if a wait in it did not end well."""
        return Verdict()

    def graph_key(self, header: StepHeader) -> Hashable | None:
        """A graph captured in a step with this key may be replayed in any other with the same; None = not to be
        captured."""
        return self.serial

    def is_over(self, event: torch.cuda.Event) -> bool:
        """`wait` would return, or raise, at once."""
        return bool(event.query())

    def wait(self, event: torch.cuda.Event) -> None:
        """Until the device has reached `event`; raises ExchangeError where it cannot."""
        event.synchronize()

    @abstractmethod
    def hold(self, graph: torch.cuda.CUDAGraph) -> None:
        """A graph was captured with this exchange in it, and must be reset should the exchange break."""

    @abstractmethod
    def abort(self) -> None:
        """Give up at once: own waits and the peers' end with an error. Idempotent."""

    def retire(self) -> None:
        """All steps in it are over, here and elsewhere: let go of what it holds."""
        self.abort()

    def lose(self, rank: int, reason: str) -> None:
        """The member of this rank is known to be gone: waits for it end now."""
        self.abort()


class LocalDeviceExchange(DeviceExchange):
    """One process owns both roles: rows go in and out without a copy. Ids are mapped where slots are in another order
    than the experts."""

    capacity = 0

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._table: torch.Tensor | None = None  # [num_layers, num_logical + 1] int32 slot, the last one -1
        self._mapped: frozenset[int] = frozenset()

    def use_placement(self, placement: Placement) -> None:
        table = torch.full((placement.num_layers, placement.num_logical_experts + 1), -1, dtype=torch.int32)
        table[:, :-1] = placement.logical_to_physical[:, :, 0]  # one rank: a physical id is a slot, any copy will do
        natural = torch.arange(placement.num_logical_experts, dtype=torch.int32)
        self._mapped = frozenset(i for i in placement.moe_layers if not table[i, :-1].equal(natural))
        if self._table is None:
            self._table = table.to(self._device)
        else:
            self._table.copy_(table)

    def dispatch(
        self, layer_id: int, x: torch.Tensor | None, topk_ids: torch.Tensor | None, stride: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert x is not None
        assert topk_ids is not None
        if layer_id not in self._mapped:
            return x, topk_ids
        assert self._table is not None
        return x, self._table[layer_id][topk_ids.long()]  # -1 reads the last one

    def combine(self, expert_rows: torch.Tensor) -> torch.Tensor | None:
        return expert_rows

    def begin(self, header: StepHeader, *, stride: int, attempt: int) -> None:
        pass

    def end(self) -> None:
        pass

    def hold(self, graph: torch.cuda.CUDAGraph) -> None:
        pass

    def graph_key(self, header: StepHeader) -> Hashable:
        return self.serial, self._mapped

    def abort(self) -> None:
        pass


def copies_table(placement: Placement, width: int) -> torch.Tensor:
    """[num_layers, num_logical, width] int32 for kernels: the number of copies, then each as ep_rank << 16 | slot. More
    copies than fit are left unused. Token t of a source goes to copy (key + t + expert) % number, key the source's
    rank, as in `dispatch.plan`."""
    copies = placement.logical_to_physical[:, :, : width - 1]
    table = torch.zeros(*copies.shape[:2], width, dtype=torch.int32)
    table[:, :, 0] = (copies >= 0).sum(-1)
    slots = placement.slots_per_rank
    table[:, :, 1 : 1 + copies.shape[2]] = torch.where(copies >= 0, copies // slots << 16 | copies % slots, 0)
    return table


def first_bad_rows(source: int, own: int, returned: Sequence[int]) -> tuple[BadRow, ...]:
    """What is not finite first, from keys of layer << 40 | token << 8 | k: of `own` rows, and of what each owner made;
    anything from NO_BAD_ROW on is none. An owner is named where its row was finite; all that is not finite behind it
    follows from it."""
    found = [
        _not_finite(Direction.RETURN, source, ep_rank, key)
        for ep_rank, key in enumerate(returned)
        if key < NO_BAD_ROW and key >> 8 < own >> 8  # by layer, then token
    ]
    if own < NO_BAD_ROW and not found:
        found.append(_not_finite(Direction.DISPATCH, source, 0, own))
    return tuple(found)


def _not_finite(direction: Direction, source: int, ep_rank: int, key: int) -> BadRow:
    return BadRow(
        fault=Fault.NOT_FINITE,
        direction=direction,
        source=source,
        ep_rank=ep_rank,
        layer_id=key >> 40,
        row=key >> 8 & 0xFFFFFFFF,
    )
