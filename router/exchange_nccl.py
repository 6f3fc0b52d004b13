"""The exchange of GPUs over NCCL: across hosts, and the reference that `peer` is checked against.

Two forms, chosen by the header's sizes, so the same on all ranks. *Padded*, up to `exact_above` rows a source: every
source sends every owner all its rows with their slots in one message, and gets back a full [stride, top_k]: no count is
needed, so it stands in a CUDA graph. *Exact* above: slots travel first, then each side counts on its device and reads
the counts (one host sync a layer), and only the rows that are needed travel. Send and receive are grouped between the
ranks that the header names; a rank that is not named takes no part.

A broken communicator is left in the order that works with graphs in it: `abort` in a thread of its own; the stuck work
then ends; graphs that hold the communicator are reset; the abort returns. It is never destroyed with a dead peer in it.
Deadlines are the host's: `wait` polls. A NaN is looked for in what comes back."""

import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence

import torch
from torch.distributed import AllToAllOptions, ProcessGroup

from ..errors import ExchangeTimeout, PeerLost, ReplicaLost
from .device_exchange import SLOW_STEPS, DeviceExchange, Verdict, copies_table, owners_and_slots
from .epoch import Epoch, StepHeader
from .exchange import RowShape
from .guard import BadRow, Direction, Fault
from .placement import Placement

_TABLE_WIDTH = 8
_NUM_VERDICTS = 8  # steps that may be launched and not yet finished
_NUM_FOUND = 5  # words of a verdict
_ENDS_S = 5.0  # within which stuck work ends after an abort; 6 ms were measured


class NcclExchange(DeviceExchange):
    """One communicator; serves every epoch of the same membership."""

    def __init__(
        self,
        group: ProcessGroup,
        epoch: Epoch,
        rank: int,
        shape: RowShape,
        *,
        capacity: int,
        exact_above: int,
        timeout_base_s: float,
        timeout_per_row_s: float,
        slow_start_s: float = 0.0,  # least deadline of the first steps
    ) -> None:
        super().__init__()
        self.capacity, self._exact_above = capacity, exact_above
        self._group, self._epoch, self._rank, self._shape = group, epoch.number, rank, shape
        self._timeout_base_s, self._timeout_per_row_s = timeout_base_s, timeout_per_row_s
        self._slow_start_s, self._num_begun = slow_start_s, 0
        self._members, self._owners, self._sources = len(epoch.members), epoch.expert_ranks, epoch.attention_ranks
        self._ep_rank = self._owners.index(rank) if rank in self._owners else -1
        self._row_bytes = shape.hidden_size * shape.dtype.itemsize
        self._message_bytes = self._row_bytes + 4 * shape.top_k
        placement, device = epoch.placement, shape.device
        sizes = placement.num_layers, placement.num_logical_experts, _TABLE_WIDTH
        self._table = torch.zeros(sizes, dtype=torch.int32, device=device)
        # Of this rank's tokens, by layer: rows that left, and that came back, not finite.
        self._sick_rows = torch.zeros(placement.num_layers, capacity, dtype=torch.bool, device=device)
        self._sick_pairs = torch.zeros(placement.num_layers, capacity, shape.top_k, dtype=torch.bool, device=device)
        self._bad_owner = torch.zeros(placement.num_layers, capacity, shape.top_k, dtype=torch.int32, device=device)
        self._num_slots = torch.zeros((), dtype=torch.int32, device=device)
        self._finishing: deque[tuple[StepHeader, torch.Tensor]] = deque()
        # On the host, made now: to pin memory may wait for a device that is stuck.
        num_counts = 2 * (len(self._owners) + len(self._sources))
        self._counts = _pinned(num_counts, device)
        self._verdicts = [_pinned(_NUM_FOUND, device) for _ in range(_NUM_VERDICTS)]
        self._num_ended = 0
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._lock = threading.Lock()
        self._header: StepHeader | None = None
        self._deadline_s, self._attempt, self._in_step = 0.0, 0, False
        self._due = 0.0  # when the newest step is late, by the host's clock
        self._last: torch.cuda.Event | None = None
        self._aborted, self._missing = False, -1

    def use_placement(self, placement: Placement) -> None:
        self._table.copy_(copies_table(placement, _TABLE_WIDTH))
        self._num_slots.fill_(placement.slots_per_rank)

    def begin(self, header: StepHeader, *, stride: int, attempt: int) -> None:
        self._header, self._attempt = header, attempt
        if self._aborted:
            raise self._gone()
        self._in_step = True
        self._deadline_s = self._timeout_base_s + self._timeout_per_row_s * sum(header.num_tokens)
        if self._num_begun < SLOW_STEPS:
            self._num_begun, self._deadline_s = self._num_begun + 1, max(self._deadline_s, self._slow_start_s)
        self._due = time.monotonic() + self._deadline_s
        self._sick_rows.zero_()
        self._sick_pairs.zero_()

    def dispatch(
        self, layer_id: int, x: torch.Tensor | None, topk_ids: torch.Tensor | None, stride: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._layer_id, self._stride, self._x = layer_id, stride, x
        if x is not None:
            assert topk_ids is not None
            self._where, slots = owners_and_slots(topk_ids, self._table[layer_id], self._rank + self._attempt)
            # [owners, stride, top_k]: this rank's slots at each owner
            here = self._where == torch.arange(len(self._owners), device=x.device)[:, None, None]
            self._here = here
            padded = slots.new_full((len(self._owners), stride, self._shape.top_k), -1)
            padded[:, : x.shape[0]] = torch.where(here, slots, -1)
            used = (self._where >= 0).any(1)
            self._sick_rows[layer_id, : x.shape[0]] |= ~torch.isfinite(x).all(1) & used
        else:
            padded = torch.empty(0, stride, self._shape.top_k, dtype=torch.int32, device=self._shape.device)
        if stride > self._exact_above:
            return self._dispatch_exact(x, padded)
        return self._dispatch_padded(x, padded)

    def combine(self, expert_rows: torch.Tensor) -> torch.Tensor | None:
        y = self._combine_exact(expert_rows) if self._stride > self._exact_above else self._combine_padded(expert_rows)
        if y is not None:
            assert self._x is not None
            layer_id, num = self._layer_id, y.shape[0]
            sick = ~torch.isfinite(y).all(2) & (self._where >= 0)
            self._sick_pairs[layer_id, :num] |= sick
            self._bad_owner[layer_id, :num] = self._where
        return y

    def end(self) -> None:
        assert self._header is not None
        self._due = time.monotonic() + self._deadline_s
        found = self._look_for_sick()
        if found.is_cuda:  # read when the step is over, while the next one may run
            host = self._verdicts[self._num_ended % _NUM_VERDICTS]
            self._num_ended += 1
            found = host.copy_(found, non_blocking=True)
            self._last = torch.cuda.Event()
            self._last.record()
        self._finishing.append((self._header, found))

    def verdict(self) -> Verdict:
        self._header, found = self._finishing.popleft()
        self._in_step = bool(self._finishing)
        if self._aborted:
            raise self._gone()
        return Verdict(self._bad_rows(found.tolist()))

    def graph_key(self, header: StepHeader) -> Hashable | None:
        if not 0 < header.bucket <= self._exact_above:
            return None  # the host reads counts
        return self.serial, header.sources

    def hold(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graphs.append(graph)

    def is_over(self, event: torch.cuda.Event) -> bool:
        return self._aborted or bool(event.query()) or time.monotonic() > self._due

    def wait(self, event: torch.cuda.Event) -> None:
        while not event.query():
            if self._aborted or time.monotonic() > self._due:
                late = not self._aborted
                self.abort()
                self._settle(event)
                raise self._late() if late else self._gone()
            time.sleep(1e-5)

    def abort(self) -> None:
        with self._lock:
            if self._aborted:
                return
            self._aborted = True
        threading.Thread(target=self._group.abort, name="nccl-abort", daemon=True).start()
        threading.Thread(target=self._reset_when_idle, name="nccl-reset", daemon=True).start()

    def lose(self, rank: int, reason: str) -> None:
        self._missing = rank
        self.abort()

    # -- breaking

    def _settle(self, event: torch.cuda.Event) -> None:
        """Stuck work ends soon after an abort; only then may its graph go."""
        deadline = time.monotonic() + _ENDS_S
        while not event.query():
            if time.monotonic() > deadline:  # whoever touches this GPU now waits for ever
                raise ReplicaLost(f"stuck work did not end within {_ENDS_S:g} s of its abort; start another process")
            time.sleep(1e-3)
        self._reset_graphs()

    def _reset_when_idle(self) -> None:
        """Where no engine waits in a step; the abort hangs while a graph holds the communicator."""
        deadline = time.monotonic() + _ENDS_S
        while self._in_step and time.monotonic() < deadline:
            time.sleep(5e-3)
        while self._last is not None and not self._last.query():
            if time.monotonic() > deadline:
                return  # as in `_settle`, and nobody waits here
            time.sleep(1e-3)
        self._reset_graphs()

    def _reset_graphs(self) -> None:
        with self._lock:
            graphs, self._graphs, self._in_step = self._graphs, [], False
        for graph in graphs:
            graph.reset()

    def _gone(self) -> PeerLost:
        who = f"rank {self._missing} is gone" if self._missing >= 0 else "the exchange was given up"
        return PeerLost(who, **self._place())

    def _late(self) -> ExchangeTimeout:
        return ExchangeTimeout(f"a rank of the step did not answer within {self._deadline_s:g} s", **self._place())

    def _place(self) -> dict[str, int]:
        header, missing = self._header, self._missing
        return {
            "ep_rank": self._owners.index(missing) if missing in self._owners else -1,
            "layer_id": -1,  # the host does not know how far the device came
            "step_id": header.step_id if header else 0,
            "epoch": header.epoch if header else self._epoch,
            "peer": missing,
        }

    # -- moving

    def _named(self) -> Sequence[int]:
        assert self._header is not None
        return self._header.sources

    def _to_owners(self, count: int) -> list[int]:
        """Split sizes, by rank, of what a source sends in equal parts."""
        return [count if r in self._owners and self._x is not None else 0 for r in range(self._members)]

    def _of_sources(self, count: int) -> list[int]:
        return [count if r in self._named() and self._ep_rank >= 0 else 0 for r in range(self._members)]

    def _all_to_all(self, out: torch.Tensor, data: torch.Tensor, receive: list[int], send: list[int]) -> None:
        if any(receive) or any(send):
            try:
                self._group.alltoall_base(out, data, receive, send, AllToAllOptions()).wait()
            except RuntimeError as error:  # DistError and all its kinds: what the library says at once
                if self._aborted:
                    raise self._gone() from error
                self.abort()
                reason = str(error).splitlines()[0][:160]
                raise PeerLost(f"the communicator broke: {reason}", **self._place()) from error

    def _spread(self, came: torch.Tensor, empty: float | int) -> torch.Tensor:
        """[named sources * stride, ...] -> [all sources * stride, ...]: a source that is not named sent nothing."""
        if self._ep_rank < 0 or len(self._named()) == len(self._sources):
            return came
        full = came.new_full((len(self._sources), self._stride, *came.shape[1:]), empty)
        index = [i for i, source in enumerate(self._sources) if source in self._named()]
        for to, part in zip(index, came.split(self._stride), strict=True):
            full[to].copy_(part)
        return full.flatten(0, 1)

    def _dispatch_padded(self, x: torch.Tensor | None, padded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stride, device = self._stride, self._shape.device
        messages = torch.empty(padded.shape[0], stride, self._message_bytes, dtype=torch.uint8, device=device)
        if x is not None:
            messages[:, : x.shape[0], : self._row_bytes] = x.contiguous().view(torch.uint8)
            messages[:, :, self._row_bytes :] = padded.view(torch.uint8)
        receive = self._of_sources(stride)
        came = torch.empty(sum(receive), self._message_bytes, dtype=torch.uint8, device=device)
        self._all_to_all(came, messages.flatten(0, 1), receive, self._to_owners(stride))
        came = self._spread(came, 0xFF)  # slots of -1
        rows = came[:, : self._row_bytes].contiguous().view(self._shape.dtype)
        slots = came[:, self._row_bytes :].contiguous().view(torch.int32)
        # After an abort the rest of a graph runs on whatever stands there: experts must not be asked by it.
        return rows, torch.where(slots < self._num_slots, slots, -1)

    def _combine_padded(self, expert_rows: torch.Tensor) -> torch.Tensor | None:
        stride, shape = self._stride, self._shape
        if self._ep_rank >= 0 and len(self._named()) < len(self._sources):
            parts = expert_rows.split(stride)
            expert_rows = torch.cat([parts[i] for i, s in enumerate(self._sources) if s in self._named()])
        receive = self._to_owners(stride)
        came = torch.empty(sum(receive), shape.top_k, shape.hidden_size, dtype=shape.dtype, device=shape.device)
        self._all_to_all(came, expert_rows.contiguous(), receive, self._of_sources(stride))
        if self._x is None:
            return None
        num = self._x.shape[0]
        came = came.view(len(self._owners), stride, shape.top_k, shape.hidden_size)
        owner = self._where.clamp(min=0).long()
        token = torch.arange(num, device=shape.device)[:, None]
        return came[owner, token, torch.arange(shape.top_k, device=shape.device)]

    def _dispatch_exact(self, x: torch.Tensor | None, padded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stride, shape = self._stride, self._shape
        receive = self._of_sources(stride)
        slots = torch.empty(sum(receive), shape.top_k, dtype=torch.int32, device=shape.device)
        self._all_to_all(slots, padded.flatten(0, 1), receive, self._to_owners(stride))
        sent_slots = padded >= 0  # [owners, stride, top_k]
        came_slots = (slots >= 0).view(-1, stride, shape.top_k)  # [named sources, stride, top_k]
        counts = [t.flatten(1).sum(1) for held in (sent_slots, came_slots) for t in (held.any(2), held)]
        self._send_rows, self._back_pairs, self._got_rows, self._answer_pairs = self._read(counts)
        data = torch.empty(0, shape.hidden_size, dtype=shape.dtype, device=shape.device)
        if x is not None:
            data = x[sent_slots.any(2).nonzero()[:, 1]]
        got = self._by_rank(self._got_rows, self._named())
        rows = torch.empty(sum(got), shape.hidden_size, dtype=shape.dtype, device=shape.device)
        self._all_to_all(rows, data, got, self._by_rank(self._send_rows, self._owners))
        slots = slots[(slots >= 0).any(1)]
        self._came_pairs = (slots >= 0).flatten()
        return rows, slots

    def _combine_exact(self, expert_rows: torch.Tensor) -> torch.Tensor | None:
        shape = self._shape
        answers = self._by_rank(self._answer_pairs, self._named())
        data = expert_rows.flatten(0, 1)
        if self._ep_rank >= 0:
            data = data[self._came_pairs]
        back = self._by_rank(self._back_pairs, self._owners)
        came = torch.empty(sum(back), shape.hidden_size, dtype=shape.dtype, device=shape.device)
        self._all_to_all(came, data, back, answers)
        if self._x is None:
            return None
        y = torch.zeros(self._x.shape[0], shape.top_k, shape.hidden_size, dtype=shape.dtype, device=shape.device)
        where = self._here.nonzero()  # by owner, token, k: the order in which owners answer
        y[where[:, 1], where[:, 2]] = came
        return y

    def _by_rank(self, counts: Sequence[int], ranks: Sequence[int]) -> list[int]:
        by_rank = [0] * self._members
        for rank, count in zip(ranks, counts, strict=False):  # none where this rank has not that role
            by_rank[rank] = count
        return by_rank

    def _read(self, counts: Sequence[torch.Tensor]) -> list[list[int]]:
        """The host sync of the exact form, with a deadline."""
        if self._shape.device.type != "cuda":
            return [part.tolist() for part in counts]
        host = self._counts[: sum(c.numel() for c in counts)]
        host.copy_(torch.cat(list(counts)), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.wait(event)
        return [part.tolist() for part in host.split([c.numel() for c in counts])]

    # -- verdict

    def _look_for_sick(self) -> torch.Tensor:
        """[5] int64: is any pair sick, the first, its owner; is any row sick, the first. By layer, then token."""
        pairs, rows = self._sick_pairs.flatten(), self._sick_rows.flatten()
        first_pair, first_row = pairs.to(torch.uint8).argmax(), rows.to(torch.uint8).argmax()
        owner = self._bad_owner.take(first_pair).long()  # indexing by a number on the device would ask the host for it
        return torch.stack([pairs.any().long(), first_pair, owner, rows.any().long(), first_row])

    def _bad_rows(self, found: Sequence[int]) -> tuple[BadRow, ...]:
        """What is not finite first: what an owner made of a row that was finite, else an own row."""
        has_pair, pair, owner, has_row, row = found
        place = divmod(pair // self._shape.top_k, self.capacity)  # layer, token
        origin = divmod(row, self.capacity)
        if has_pair and (not has_row or place < origin):
            return (self._bad_row(Direction.RETURN, owner, *place),)
        return (self._bad_row(Direction.DISPATCH, 0, *origin),) if has_row else ()

    def _bad_row(self, direction: Direction, ep_rank: int, layer_id: int, row: int) -> BadRow:
        return BadRow(
            fault=Fault.NOT_FINITE,
            direction=direction,
            source=self._rank,
            ep_rank=ep_rank,
            layer_id=layer_id,
            row=row,
        )


def _pinned(size: int, device: torch.device) -> torch.Tensor:
    """int64 on the host, for copies from `device`."""
    return torch.empty(size, dtype=torch.int64, pin_memory=device.type == "cuda")
