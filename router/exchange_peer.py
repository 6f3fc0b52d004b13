"""The exchange of GPUs of one host: kernels write rows into the peers' memory (`kernels/peer_exchange.cu`).

One launch to send and to wait for what others send, one to answer and to wait for the answers; no communicator, no
padding on the wire, no host in between. A token's row goes once to each rank that needs it, the local slots of all its
`stride` rows to every owner. The first wait that does not end well writes `poison` to all ranks, so that a step fails
everywhere at once; the host learns it from the verdict at the step's end. `lose` and `abort` write poison too, for a
member whose death was seen elsewhere earlier than the deadline. Idea: DeepEP's low-latency mode, on peer memory."""

import struct
from collections import deque
from collections.abc import Hashable, Sequence

import torch

from ..errors import ExchangeError, ExchangeTimeout, KernelError, PeerLost
from ..kernels.peer_exchange import (
    ANSWER,
    ARRIVAL,
    BAD_DISPATCH_AT,
    BAD_RETURN_AT,
    ERROR_AT,
    LATE,
    MAX_SLOTS,
    NONE,
    POISON_AT,
    TABLE_WIDTH,
    VERDICT_AT,
    VERDICT_BYTES,
    PeerBuffer,
    PeerKernels,
    load_peer_kernels,
    mesh_argument,
)
from ..kernels.peer_memory import PeerMemory, Poison
from .device_exchange import SLOW_STEPS, DeviceExchange, Verdict, copies_table, first_bad_rows
from .epoch import Epoch, StepHeader
from .exchange import RowShape
from .group import meet_peers
from .guard import BadRow
from .placement import Placement

_NUM_VERDICTS = 8  # steps that may be launched and not yet finished


class PeerExchange(DeviceExchange):
    """One membership; serves every epoch of it."""

    def __init__(
        self,
        epoch: Epoch,
        rank: int,
        shape: RowShape,
        memory: PeerMemory,
        addresses: Sequence[int],  # of every rank's buffer, as mapped here
        *,
        timeout_base_s: float,
        timeout_per_row_s: float,
        early_next: bool,
        slow_start_s: float = 0.0,  # least deadline of the first steps
    ) -> None:
        super().__init__()
        self.capacity = memory.layout.capacity
        self._epoch, self._rank, self._shape, self._memory = epoch.number, rank, shape, memory
        self._timeout_base_s, self._timeout_per_row_s = timeout_base_s, timeout_per_row_s
        self._slow_start_s, self._num_begun = slow_start_s, 0
        self._owners, self._sources = epoch.expert_ranks, epoch.attention_ranks
        self._source_index = {r: i for i, r in enumerate(self._sources)}
        owner = self._owners.index(rank) if rank in self._owners else -1
        self._is_source = rank in self._source_index
        layouts = peer_layouts(epoch, shape, self.capacity)
        self._kernels = PeerKernels(
            mesh_argument(
                memory.base,
                [(r, addresses[r], layouts[r]) for r in self._owners],
                [(r, addresses[r], layouts[r]) for r in self._sources],
                own_owner=owner,
                own_source=self._source_index.get(rank, -1),
            ),
            num_sources=len(self._sources),
            num_owners=len(self._owners),
            owns=owner >= 0,
            hidden=shape.hidden_size,
            top_k=shape.top_k,
            dtype=shape.dtype,
            early_next=early_next,
            device=memory.device,
        )
        self._kernels.load()
        layout, num_rows = memory.layout, len(self._sources) * self.capacity if owner >= 0 else 0
        self._rows = memory.view(layout.rows_at, shape.dtype, num_rows, shape.hidden_size)
        self._slots = memory.view(layout.slots_at, torch.int32, num_rows, shape.top_k)
        num_answers = self.capacity if self._is_source else 0
        self._answers = memory.view(layout.answers_at, shape.dtype, num_answers, shape.top_k, shape.hidden_size)
        self._verdict = memory.bytes[VERDICT_AT : VERDICT_AT + VERDICT_BYTES]
        self._verdicts = [torch.empty(VERDICT_BYTES, dtype=torch.uint8).pin_memory() for _ in range(_NUM_VERDICTS)]
        self._finishing: deque[tuple[StepHeader, torch.Tensor]] = deque()  # ended, their verdict not read
        self._num_ended = 0
        placement = epoch.placement
        self._table = torch.zeros(
            placement.num_layers, placement.num_logical_experts, TABLE_WIDTH, dtype=torch.int32, device=memory.device
        )
        self._poison = Poison([address + POISON_AT for address in addresses], memory.device)
        self._header: StepHeader | None = None
        self._stride, self._num_tokens, self._layer_id, self._is_first = 0, -1, 0, False
        self._deadline_s = 0.0
        self._last: torch.cuda.Event | None = None
        self._aborted = False
        self._missing = -1  # rank known to be gone
        torch.cuda.current_stream(memory.device).synchronize()

    def use_placement(self, placement: Placement) -> None:
        if placement.slots_per_rank > MAX_SLOTS:
            raise KernelError(f"{placement.slots_per_rank} slots a rank, at most {MAX_SLOTS}: use more expert ranks")
        self._table.copy_(copies_table(placement, TABLE_WIDTH))

    def begin(self, header: StepHeader, *, stride: int, attempt: int) -> None:
        self._header, self._is_first = header, True
        if self._aborted:
            raise self._error(PeerLost, "the exchange was given up", self._missing, -1)
        named = sum(1 << self._source_index[rank] for rank in header.sources)
        self._deadline_s = self._timeout_base_s + self._timeout_per_row_s * sum(header.num_tokens)
        if self._num_begun < SLOW_STEPS:
            self._num_begun, self._deadline_s = self._num_begun + 1, max(self._deadline_s, self._slow_start_s)
        self._kernels.begin(named, self._deadline_s, self._rank + attempt)

    def dispatch(
        self, layer_id: int, x: torch.Tensor | None, topk_ids: torch.Tensor | None, stride: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if x is not None:
            self._check(x, topk_ids, stride)
        self._kernels.dispatch(x, topk_ids, self._table, stride=stride, layer_id=layer_id, is_first=self._is_first)
        self._is_first, self._stride, self._layer_id = False, stride, layer_id
        self._num_tokens = -1 if x is None else x.shape[0]
        num_rows = len(self._sources) * stride if self._rows.shape[0] else 0
        return self._rows[:num_rows], self._slots[:num_rows]

    def combine(self, expert_rows: torch.Tensor) -> torch.Tensor | None:
        self._kernels.answer(expert_rows, stride=self._stride, layer_id=self._layer_id)
        return None if self._num_tokens < 0 else self._answers[: self._num_tokens]

    def end(self) -> None:
        assert self._header is not None
        host = self._verdicts[self._num_ended % _NUM_VERDICTS]
        self._num_ended += 1
        host.copy_(self._verdict, non_blocking=True)
        self._last = torch.cuda.Event()
        self._last.record()
        self._finishing.append((self._header, host))

    def verdict(self) -> Verdict:
        self._header, host = self._finishing.popleft()
        words = host.numpy().tobytes()
        (error,) = struct.unpack_from("<Q", words, ERROR_AT)
        if error != NONE:
            raise self._as_error(error)
        return Verdict(self._bad_rows(words))

    def graph_key(self, header: StepHeader) -> Hashable:
        return self.serial

    def hold(self, graph: torch.cuda.CUDAGraph) -> None:
        pass  # its waits end by themselves

    def abort(self) -> None:
        self._give_up(self._rank)

    def lose(self, rank: int, reason: str) -> None:
        self._missing = rank
        self._give_up(rank)

    def retire(self) -> None:
        if not self._aborted:
            self._aborted = True
            self._memory.release(self._last, self)

    def _give_up(self, missing: int) -> None:
        if not self._aborted:
            self._aborted = True
            self._poison.write(1 + missing, skip=self._missing)
            self._memory.release(self._last, self)

    def _check(self, x: torch.Tensor, topk_ids: torch.Tensor | None, stride: int) -> None:
        shape = self._shape
        ok = x.dtype == shape.dtype and x.is_contiguous() and x.shape[1] == shape.hidden_size and x.shape[0] <= stride
        if not ok or not x.is_cuda:
            raise KernelError(f"rows must be contiguous {shape.dtype} [<= {stride}, {shape.hidden_size}] on the GPU")
        if topk_ids is None or topk_ids.dtype != torch.int32 or not topk_ids.is_contiguous() or not topk_ids.is_cuda:
            raise KernelError("topk_ids must be contiguous int32 on the GPU")

    def _as_error(self, error: int) -> ExchangeError:
        layer_id, wait, reason, rank = error >> 32, error >> 24 & 0xFF, error >> 16 & 0xFF, error & 0xFFFF
        what = {ARRIVAL: "rows", ANSWER: "answers"}.get(wait, "room for rows")
        if reason == LATE:
            return self._error(
                ExchangeTimeout, f"no {what} of rank {rank} within {self._deadline_s:g} s", rank, layer_id
            )
        if self._missing >= 0:
            return self._error(PeerLost, f"rank {self._missing} is gone", self._missing, layer_id)
        if rank == self._rank:
            return self._error(PeerLost, "the exchange was given up", rank, layer_id)
        return self._error(PeerLost, f"rank {rank} gave up, or is missed by another rank", rank, layer_id)

    def _error(self, kind: type[ExchangeError], message: str, rank: int, layer_id: int) -> ExchangeError:
        assert self._header is not None
        return kind(
            message,
            ep_rank=self._owners.index(rank) if rank in self._owners else -1,
            layer_id=layer_id,
            step_id=self._header.step_id,
            epoch=self._header.epoch,
            peer=rank,
        )

    def _bad_rows(self, words: bytes) -> tuple[BadRow, ...]:
        (own,) = struct.unpack_from("<Q", words, BAD_DISPATCH_AT)
        return first_bad_rows(self._rank, own, struct.unpack_from(f"<{len(self._owners)}Q", words, BAD_RETURN_AT))


def peer_layouts(epoch: Epoch, shape: RowShape, capacity: int) -> list[PeerBuffer]:
    """Of every rank's buffer."""
    return [
        PeerBuffer(
            num_sources=len(epoch.attention_ranks),
            capacity=capacity,
            row_bytes=shape.hidden_size * shape.dtype.itemsize,
            top_k=shape.top_k,
            is_owner=member.expert,
            is_source=member.attention,
        )
        for member in epoch.members
    ]


def build_peer(
    epoch: Epoch,
    rank: int,
    shape: RowShape,
    *,
    capacity: int,
    timeout_base_s: float,
    timeout_per_row_s: float,
    epoch_timeout_s: float,
    slow_start_s: float = 0.0,
    early_next: bool = False,
) -> PeerExchange:
    """Allocate, publish, and map the others' buffers. Blocks; EpochError when one does not come in time. `early_next`
    only where every member has a GPU of its own (`peer_exchange.cu`); off until it is measured there."""
    layouts = peer_layouts(epoch, shape, capacity)
    num_sources, num_owners = len(epoch.attention_ranks), len(epoch.expert_ranks)
    load_peer_kernels(num_sources, num_owners, shape.hidden_size, shape.top_k, shape.dtype, early_next, shape.device)
    memory = PeerMemory(layouts[rank], shape.device)
    try:
        addresses = meet_peers(epoch, rank, memory, layouts, timeout_s=epoch_timeout_s)
    except BaseException:
        memory.release(None)
        raise
    return PeerExchange(
        epoch,
        rank,
        shape,
        memory,
        addresses,
        timeout_base_s=timeout_base_s,
        timeout_per_row_s=timeout_per_row_s,
        early_next=early_next,
        slow_start_s=slow_start_s,
    )
