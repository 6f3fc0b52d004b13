"""The exchange of GPUs over NCCL: across hosts, and the reference that `peer` is checked against.

Three forms of a turn (`nccl_form.py`, `nccl_turns.py`), chosen by what the header says, so the same on all ranks:
*padded* and *bounded* stand in CUDA graphs, *exact* does not. Send and receive are grouped between the ranks that the
header names; a rank that is not named takes no part. Answers without a place void the step of their source alone.

A broken communicator is left in the order that works with graphs in it: `abort` in a thread of its own; the stuck work
then ends; graphs that hold the communicator are reset; the abort returns. It is never destroyed with a dead peer in it.
Deadlines are the host's: `wait` polls. A NaN is looked for in what comes back."""

import threading
import time
from collections import deque
from collections.abc import Hashable, Mapping

import torch
from torch.distributed import AllToAllOptions, ProcessGroup

from ..errors import ExchangeTimeout, PeerLost, ReplicaLost
from .device_exchange import NO_BAD_ROW, SLOW_STEPS, DeviceExchange, Verdict, first_bad_rows
from .epoch import WHOLE, Epoch, StepHeader
from .exchange import RowShape
from .nccl_form import NcclForms
from .nccl_turns import NcclTurns, pinned
from .placement import Placement

_NUM_VERDICTS = 8  # steps that may be launched and not yet finished
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
        forms: NcclForms | None = None,  # other ones than these numbers give
    ) -> None:
        super().__init__()
        self.capacity = capacity
        self.forms = forms or NcclForms(
            num_owners=len(epoch.expert_ranks),
            top_k=shape.top_k,
            row_bytes=shape.hidden_size * shape.dtype.itemsize,
            exact_above=exact_above,
        )
        self._group, self._epoch, self._rank, self._shape = group, epoch.number, rank, shape
        self._timeout_base_s, self._timeout_per_row_s = timeout_base_s, timeout_per_row_s
        self._slow_start_s, self._num_begun = slow_start_s, 0
        self._members, self._owners = len(epoch.members), epoch.expert_ranks
        self._turns = NcclTurns(epoch, rank, shape, forms=self.forms, all_to_all=self._all_to_all, wait=self.wait)
        # On the current stream: one of its own costs two events each time, and a launch behind it could not come early.
        self._options = AllToAllOptions()
        self._options.asyncOp = False
        self._finishing: deque[tuple[StepHeader, torch.Tensor]] = deque()
        # On the host, made now: to pin memory may wait for a device that is stuck.
        self._verdicts = [pinned(2 + len(self._owners), shape.device, torch.int64) for _ in range(_NUM_VERDICTS)]
        self._num_ended = 0
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._lock = threading.Lock()
        self._header: StepHeader | None = None
        self._deadline_s, self._in_step = 0.0, False
        self._due = 0.0  # when the newest step is late, by the host's clock
        self._last: torch.cuda.Event | None = None
        self._aborted, self._missing = False, -1

    def use_placement(self, placement: Placement) -> None:
        self._turns.use_placement(placement)

    def begin(self, header: StepHeader, *, stride: int, attempt: int) -> None:
        self._header = header
        if self._aborted:
            raise self._gone()
        self._in_step = True
        self._deadline_s = self._timeout_base_s + self._timeout_per_row_s * sum(header.num_tokens)
        if self._num_begun < SLOW_STEPS:
            self._num_begun, self._deadline_s = self._num_begun + 1, max(self._deadline_s, self._slow_start_s)
        self._due = time.monotonic() + self._deadline_s
        self._turns.begin(header, attempt)

    def dispatch(
        self, layer_id: int, x: torch.Tensor | None, topk_ids: torch.Tensor | None, stride: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._turns.dispatch(layer_id, x, topk_ids, stride)

    def combine(self, expert_rows: torch.Tensor) -> torch.Tensor | None:
        return self._turns.combine(expert_rows)

    def end(self) -> None:
        assert self._header is not None
        self._due = time.monotonic() + self._deadline_s
        found = self._turns.found
        if found.is_cuda:  # read when the step is over, while the next one may run
            host = self._verdicts[self._num_ended % _NUM_VERDICTS]
            self._num_ended += 1
            host.copy_(found, non_blocking=True)
            self._last = torch.cuda.Event()
            self._last.record()
            found = host
        else:
            found = found.clone()
        self._finishing.append((self._header, found))

    def verdict(self) -> Verdict:
        self._header, found = self._finishing.popleft()
        self._in_step = bool(self._finishing)
        if self._aborted:
            raise self._gone()
        no_place, own, *returned = found.tolist()
        if no_place < NO_BAD_ROW:  # what is bad from there on follows from it, and the step runs again
            return Verdict(overflow=no_place >> 40)
        return Verdict(first_bad_rows(self._rank, own, returned))

    def graph_key(self, header: StepHeader) -> Hashable | None:
        whole = bool(header.flags & WHOLE)
        if not header.bucket or self.forms.is_exact(header.bucket, whole=whole):
            return None  # the host reads counts
        return self.serial, header.sources, self.forms.bound(header.bucket, whole=whole)

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

    def _all_to_all(self, receive: Mapping[int, torch.Tensor], send: Mapping[int, torch.Tensor]) -> None:
        """By rank, each contiguous and read or written where it lies; a rank that is not there takes no part."""
        parts = [*receive.values(), *send.values()]
        if not any(part.numel() for part in parts):
            return
        nothing = parts[0].flatten()[:0]
        out = [receive.get(rank, nothing) for rank in range(self._members)]
        data = [send.get(rank, nothing) for rank in range(self._members)]
        try:
            if self._shape.device.type == "cuda":
                work = self._group.alltoall(out, data, self._options)
                if work is not None:
                    work.wait()
            else:
                self._all_to_all_as_one(out, data)
        except RuntimeError as error:  # DistError and all its kinds: what the library says at once
            if self._aborted:
                raise self._gone() from error
            self.abort()
            reason = str(error).splitlines()[0][:160]
            raise PeerLost(f"the communicator broke: {reason}", **self._place()) from error

    def _all_to_all_as_one(self, out: list[torch.Tensor], data: list[torch.Tensor]) -> None:
        """Gloo has this form alone."""
        sizes = [part.numel() for part in out]
        came = out[0].new_empty(sum(sizes))
        sent = torch.cat([part.flatten() for part in data])
        self._group.alltoall_base(came, sent, sizes, [part.numel() for part in data], AllToAllOptions()).wait()
        for part, piece in zip(out, came.split(sizes), strict=True):
            part.copy_(piece.view(part.shape))
