"""The exchange of GPUs over NCCL: across hosts, and the reference that `peer` is checked against.

Two forms, chosen by the header's sizes, so the same on all ranks. *Padded*, up to `exact_above` rows a source: every
source sends every other owner all its rows, each with its slots, and gets back a full [stride, top_k]: no count is
needed, so it stands in a CUDA graph. *Exact* above: counts travel first and are read (one host sync a layer), and only
the rows that are needed travel, then only the pairs. What a rank has for itself does not travel. Around each
all-to-all stands one launch (`kernels/nccl_pack.cu`; in plain torch on CPUs). Send and receive are grouped between the
ranks that the header names; a rank that is not named takes no part.

A broken communicator is left in the order that works with graphs in it: `abort` in a thread of its own; the stuck work
then ends; graphs that hold the communicator are reset; the abort returns. It is never destroyed with a dead peer in it.
Deadlines are the host's: `wait` polls. A NaN is looked for in what comes back."""

import logging
import threading
import time
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch.distributed import AllToAllOptions, ProcessGroup

from ..errors import EpochError, ExchangeTimeout, PeerLost, ReplicaLost
from ..kernels.nccl_pack import BAD_ROW, KEY_SHIFT, MAX_SLOTS, NONE, NUM_SLOTS, TABLE_WIDTH, NcclPack, PackSizes
from ..kernels.nccl_pack_reference import TorchPack
from .device_exchange import SLOW_STEPS, DeviceExchange, Verdict, copies_table, first_bad_rows
from .epoch import Epoch, StepHeader
from .exchange import RowShape
from .placement import Placement

logger = logging.getLogger(__name__)

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
    ) -> None:
        super().__init__()
        self.capacity, self._exact_above = capacity, exact_above
        self._group, self._epoch, self._rank, self._shape = group, epoch.number, rank, shape
        self._timeout_base_s, self._timeout_per_row_s = timeout_base_s, timeout_per_row_s
        self._slow_start_s, self._num_begun = slow_start_s, 0
        self._members, self._owners, self._sources = len(epoch.members), epoch.expert_ranks, epoch.attention_ranks
        self._ep_rank = self._owners.index(rank) if rank in self._owners else -1
        self._own_source = self._sources.index(rank) if rank in self._sources else -1
        placement, device = epoch.placement, shape.device
        sizes = placement.num_layers, placement.num_logical_experts, TABLE_WIDTH
        self._table = torch.zeros(sizes, dtype=torch.int32, device=device)
        self._facts = torch.full((BAD_ROW + 1 + len(self._owners),), NONE, dtype=torch.int64, device=device)
        self._key_shift, self._num_slots, self._found = self._facts[KEY_SHIFT], self._facts[NUM_SLOTS], self._facts[2:]
        self._sizes = PackSizes(
            num_sources=len(self._sources),
            num_owners=len(self._owners),
            own_source=self._own_source,
            own_owner=self._ep_rank,
            hidden=shape.hidden_size,
            top_k=shape.top_k,
            dtype=shape.dtype,
        )
        self._pack = _make_pack(self._sizes, device)
        self._turn: _Turn | None = None
        self._finishing: deque[tuple[StepHeader, torch.Tensor]] = deque()
        # On the host, made now: to pin memory may wait for a device that is stuck.
        self._counts = _pinned(2 * (len(self._owners) + len(self._sources)), device, torch.int32)
        self._verdicts = [_pinned(1 + len(self._owners), device, torch.int64) for _ in range(_NUM_VERDICTS)]
        self._num_ended = 0
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._lock = threading.Lock()
        self._header: StepHeader | None = None
        self._deadline_s, self._in_step = 0.0, False
        self._due = 0.0  # when the newest step is late, by the host's clock
        self._last: torch.cuda.Event | None = None
        self._aborted, self._missing = False, -1

    def use_placement(self, placement: Placement) -> None:
        if placement.slots_per_rank > MAX_SLOTS:
            raise EpochError(f"{placement.slots_per_rank} slots a rank, at most {MAX_SLOTS}: use more expert ranks")
        self._table.copy_(copies_table(placement, TABLE_WIDTH))
        self._num_slots.fill_(placement.slots_per_rank)

    def begin(self, header: StepHeader, *, stride: int, attempt: int) -> None:
        self._header = header
        if self._aborted:
            raise self._gone()
        self._in_step = True
        self._deadline_s = self._timeout_base_s + self._timeout_per_row_s * sum(header.num_tokens)
        if self._num_begun < SLOW_STEPS:
            self._num_begun, self._deadline_s = self._num_begun + 1, max(self._deadline_s, self._slow_start_s)
        self._due = time.monotonic() + self._deadline_s
        self._named = sum(1 << i for i, source in enumerate(self._sources) if source in header.sources)
        self._key_shift.fill_(self._rank + attempt)  # on the device: a graph may be replayed in a later attempt
        self._found.fill_(NONE)

    def dispatch(
        self, layer_id: int, x: torch.Tensor | None, topk_ids: torch.Tensor | None, stride: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._layer_id, self._stride = layer_id, stride
        if stride > self._exact_above:
            self._turn = self._dispatch_exact(x, topk_ids)
        else:
            self._turn = self._dispatch_padded(x, topk_ids)
        return self._turn.rows, self._turn.slots

    def combine(self, expert_rows: torch.Tensor) -> torch.Tensor | None:
        turn = self._turn
        assert turn is not None
        expert_rows = expert_rows.contiguous()
        if turn.counts is None:
            answers = self._answer_padded(expert_rows, turn)
        else:
            answers = self._answer_exact(expert_rows, turn)
        if turn.where is None:
            return None
        y = answers.new_empty(*turn.where.shape, self._shape.hidden_size)
        self._pack.unpack_answers(
            expert_rows,
            answers,
            turn.where,
            self._facts,
            y,
            layer_id=self._layer_id,
            stride=self._stride,
            own_begin=turn.own[0],
            places=turn.places,
            counts=turn.counts,
        )
        return y

    def end(self) -> None:
        assert self._header is not None
        self._due = time.monotonic() + self._deadline_s
        found = self._found
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
        own, *returned = found.tolist()
        return Verdict(first_bad_rows(self._rank, own, returned))

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

    def _dispatch_padded(self, x: torch.Tensor | None, ids: torch.Tensor | None) -> "_Turn":
        stride, owns = self._stride, self._ep_rank >= 0
        own = (0, 0)
        if owns and x is not None:
            own = self._own_source * stride, (self._own_source + 1) * stride
        rows, slots = self._rows(len(self._sources) * stride if owns else 0)
        turn = _Turn(rows=rows, slots=slots, own=own)
        parts: dict[int, torch.Tensor] = {}
        if x is not None:
            others = {rank: stride for rank in self._owners if rank != self._rank}
            messages = self._messages(len(others) * stride)
            self._pack_rows(turn, messages, x, ids)
            parts = _split(messages, others)
        turn.came = self._messages(rows.shape[0] - (own[1] - own[0]))
        came = _split(turn.came, {r: stride for r in self._sources if owns and (r != self._rank or own == (0, 0))})
        self._all_to_all({rank: came[rank] for rank in self._others_named() if owns}, parts)
        if owns:
            self._unpack(turn, stride)
        return turn

    def _answer_padded(self, expert_rows: torch.Tensor, turn: "_Turn") -> torch.Tensor:
        """[rows of the other owners, top_k, hidden]."""
        stride, shape = self._stride, self._shape
        others = {rank: stride for rank in self._owners if turn.where is not None and rank != self._rank}
        answers = expert_rows.new_empty(len(others) * stride, shape.top_k, shape.hidden_size)
        parts = {}
        if self._ep_rank >= 0:
            made = _split(expert_rows, dict.fromkeys(self._sources, stride))
            parts = {rank: made[rank] for rank in self._others_named()}
        self._all_to_all(_split(answers, others), parts)
        return answers

    def _dispatch_exact(self, x: torch.Tensor | None, ids: torch.Tensor | None) -> "_Turn":
        num_owners, owns = len(self._owners), self._ep_rank >= 0
        counts = torch.zeros(num_owners + len(self._sources), 2, dtype=torch.int32, device=self._shape.device)
        places = None
        if x is not None:
            assert ids is not None
            places = counts.new_empty(num_owners, x.shape[0], 2)
            self._pack.count(ids, self._table, self._facts, places, counts, layer_id=self._layer_id)
        send = {rank: counts[p] for p, rank in enumerate(self._owners) if x is not None and rank != self._rank}
        receive = {rank: counts[num_owners + self._sources.index(rank)] for rank in self._others_named() if owns}
        self._all_to_all(receive, send)
        go, come = self._read(counts)
        own = (0, 0)
        if owns and x is not None:
            before = sum(num_rows for num_rows, _ in come[: self._own_source])
            own = before, before + come[self._own_source][0]
        rows, slots = self._rows(sum(num_rows for num_rows, _ in come))
        turn = _Turn(rows=rows, slots=slots, own=own, places=places, counts=counts)
        send_rows, back = ({r: c[i] for r, c in zip(self._owners, go, strict=True) if r != self._rank} for i in (0, 1))
        got, answer = ({r: c[i] for r, c in zip(self._sources, come, strict=True) if r != self._rank} for i in (0, 1))
        turn.back, turn.answer = back, answer
        messages = self._messages(sum(send_rows.values()))
        if x is not None:
            self._pack_rows(turn, messages, x, ids)
        turn.came = self._messages(sum(got.values()))
        self._all_to_all(_split(turn.came, got), _split(messages, send_rows))
        if owns:
            self._unpack(turn, 0)
        return turn

    def _answer_exact(self, expert_rows: torch.Tensor, turn: "_Turn") -> torch.Tensor:
        """[pairs of the other owners, hidden]."""
        assert turn.counts is not None
        assert turn.came is not None
        data = expert_rows.new_empty(sum(turn.answer.values()), self._shape.hidden_size)
        if data.shape[0]:
            self._pack.pack_answers(expert_rows, turn.slots, turn.came, turn.counts, data, own=turn.own)
        answers = data.new_empty(sum(turn.back.values()), self._shape.hidden_size)
        self._all_to_all(_split(answers, turn.back), _split(data, turn.answer))
        return answers

    def _pack_rows(self, turn: "_Turn", messages: torch.Tensor, x: torch.Tensor, ids: torch.Tensor | None) -> None:
        assert ids is not None
        turn.where = torch.empty_like(ids)
        self._pack.pack(
            x,
            ids,
            self._table,
            self._facts,
            messages,
            turn.rows,
            turn.slots,
            turn.where,
            layer_id=self._layer_id,
            stride=self._stride,
            own_begin=turn.own[0],
            places=turn.places,
            counts=turn.counts,
        )

    def _unpack(self, turn: "_Turn", stride: int) -> None:
        assert turn.came is not None
        self._pack.unpack(turn.came, self._facts, turn.rows, turn.slots, own=turn.own, stride=stride, named=self._named)

    def _others_named(self) -> list[int]:
        return [r for i, r in enumerate(self._sources) if self._named >> i & 1 and r != self._rank]

    def _rows(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self._shape
        rows = torch.empty(num_rows, shape.hidden_size, dtype=shape.dtype, device=shape.device)
        return rows, torch.empty(num_rows, shape.top_k, dtype=torch.int32, device=shape.device)

    def _messages(self, num_rows: int) -> torch.Tensor:
        return torch.empty(num_rows, self._sizes.message_bytes, dtype=torch.uint8, device=self._shape.device)

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
                self._group.alltoall(out, data, AllToAllOptions()).wait()
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

    def _read(self, counts: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """[rows, pairs] to each owner, and of each source: the host sync of the exact form, with a deadline."""
        host = counts
        if counts.is_cuda:
            host = self._counts
            host.copy_(counts.flatten(), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self.wait(event)
        found = host.view(-1, 2).tolist()
        return found[: len(self._owners)], found[len(self._owners) :]


@dataclass(slots=True, kw_only=True)
class _Turn:
    """What `combine` must know of the `dispatch` before it."""

    rows: torch.Tensor  # [R, hidden]
    slots: torch.Tensor  # [R, top_k] int32
    own: tuple[int, int]  # rows of this rank's own tokens among them
    came: torch.Tensor | None = None  # messages that brought the others
    where: torch.Tensor | None = None  # [T, top_k] int32 owners; None = no source
    places: torch.Tensor | None = None  # exact form only, as the rest
    counts: torch.Tensor | None = None
    back: dict[int, int] = field(default_factory=dict)  # pairs that each owner answers
    answer: dict[int, int] = field(default_factory=dict)  # and that each source is answered


def _split(rows: torch.Tensor, counts: Mapping[int, int]) -> dict[int, torch.Tensor]:
    return dict(zip(counts, rows.split(list(counts.values())) if counts else (), strict=True))


def _make_pack(sizes: PackSizes, device: torch.device) -> NcclPack | TorchPack:
    if device.type != "cuda":
        return TorchPack(sizes)
    if not sizes.has_kernels:
        logger.warning("exchange.backend=nccl packs rows in plain torch, slower than its kernels: %s", sizes)
        return TorchPack(sizes)
    pack = NcclPack(sizes, device)
    pack.load()
    return pack


def _pinned(size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """On the host, for copies from `device`."""
    return torch.empty(size, dtype=dtype, pin_memory=device.type == "cuda")
