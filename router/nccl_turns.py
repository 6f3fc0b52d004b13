"""One rank's turns of the exchange over NCCL: what goes to whom, in each form (`nccl_form.py` says which).
exchange_nccl.py has the communicator.

*Padded*: every source sends every other owner all its rows, each with its slots, and gets back a full [stride, top_k]:
no count is needed, so it stands in a CUDA graph. *Bounded*: the same, but what comes back are the pairs, close together
in so many places. *Exact*: counts travel first and are read (one host sync a layer), and only the rows that are needed
travel, then only the pairs. What a rank has for itself does not travel. On each side of an all-to-all stands one launch
or none (`kernels/nccl_pack.cu`; in plain torch on CPUs)."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..errors import EpochError
from ..kernels.nccl_pack import (
    BAD_ANSWER,
    KEY_SHIFT,
    MAX_SLOTS,
    NO_PLACE,
    NONE,
    NUM_SLOTS,
    TABLE_WIDTH,
    NcclPack,
    PackSizes,
    pairs_pitch,
)
from ..kernels.nccl_pack_reference import TorchPack
from .device_exchange import copies_table
from .epoch import WHOLE, Epoch, StepHeader
from .exchange import RowShape
from .nccl_form import NcclForms
from .placement import Placement

logger = logging.getLogger(__name__)

Parts = Mapping[int, torch.Tensor]  # by rank


class NcclTurns:
    """Of one membership."""

    def __init__(
        self,
        epoch: Epoch,
        rank: int,
        shape: RowShape,
        *,
        forms: NcclForms,
        all_to_all: Callable[[Parts, Parts], None],  # receive, send
        wait: Callable[[torch.cuda.Event], None],
    ) -> None:
        self._rank, self._shape, self._forms = rank, shape, forms
        self._all_to_all, self._wait = all_to_all, wait
        self._owners, self._sources = epoch.expert_ranks, epoch.attention_ranks
        self._owns = rank in self._owners
        self._own_source = self._sources.index(rank) if rank in self._sources else -1
        placement, device = epoch.placement, shape.device
        sizes = placement.num_layers, placement.num_logical_experts, TABLE_WIDTH
        self._table = torch.zeros(sizes, dtype=torch.int32, device=device)
        self._facts = torch.full((BAD_ANSWER + len(self._owners),), NONE, dtype=torch.int64, device=device)
        self._key_shift, self._num_slots = self._facts[KEY_SHIFT], self._facts[NUM_SLOTS]
        # Of the step: first pair without a place, first bad row of its own, then of each owner.
        self.found = self._facts[NO_PLACE:]
        self._sizes = PackSizes(
            num_sources=len(self._sources),
            num_owners=len(self._owners),
            own_source=self._own_source,
            own_owner=self._owners.index(rank) if self._owns else -1,
            hidden=shape.hidden_size,
            top_k=shape.top_k,
            dtype=shape.dtype,
        )
        self._pack = _make_pack(self._sizes, device)
        self._counts = pinned(2 * (len(self._owners) + len(self._sources)), device, torch.int32)
        self._named = 0  # a bit for each source
        self._whole = False
        self._turn: _Turn | None = None

    def use_placement(self, placement: Placement) -> None:
        if placement.slots_per_rank > MAX_SLOTS:
            raise EpochError(f"{placement.slots_per_rank} slots a rank, at most {MAX_SLOTS}: use more expert ranks")
        self._table.copy_(copies_table(placement, TABLE_WIDTH))
        self._num_slots.fill_(placement.slots_per_rank)

    def begin(self, header: StepHeader, attempt: int) -> None:
        self._named = sum(1 << i for i, source in enumerate(self._sources) if source in header.sources)
        self._whole = bool(header.flags & WHOLE)
        self._key_shift.fill_(self._rank + attempt)  # on the device: a graph may be replayed in a later attempt
        self.found.fill_(NONE)

    def dispatch(
        self, layer_id: int, x: torch.Tensor | None, topk_ids: torch.Tensor | None, stride: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._layer_id, self._stride = layer_id, stride
        if self._forms.is_exact(stride, whole=self._whole):
            self._turn = self._dispatch_exact(x, topk_ids)
        else:
            self._turn = self._dispatch_padded(x, topk_ids)
        return self._turn.rows, self._turn.slots

    def combine(self, expert_rows: torch.Tensor) -> torch.Tensor | None:
        turn = self._turn
        assert turn is not None
        expert_rows = expert_rows.contiguous()
        if turn.counts is not None:
            answers = self._answer_exact(expert_rows, turn)
        elif turn.bound:
            answers = self._answer_bounded(expert_rows, turn)
        else:
            answers = self._answer_padded(expert_rows, turn)
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
            pairs=turn.sent_pairs,
            bound=turn.bound,
        )
        return y

    def _dispatch_padded(self, x: torch.Tensor | None, ids: torch.Tensor | None) -> "_Turn":
        stride = self._stride
        own = (0, 0)
        if self._owns and x is not None:
            own = self._own_source * stride, (self._own_source + 1) * stride
        rows, slots = self._rows(len(self._sources) * stride if self._owns else 0)
        turn = _Turn(rows=rows, slots=slots, own=own, bound=self._forms.bound(stride, whole=self._whole))
        if turn.bound and x is not None:
            turn.sent_pairs = self._pairs(len(self._owners))
        if turn.bound and self._owns:
            turn.came_pairs = self._pairs(len(self._sources))
        parts: dict[int, torch.Tensor] = {}
        if x is not None:
            others = {rank: stride for rank in self._owners if rank != self._rank}
            messages = self._messages(len(others) * stride)
            self._pack_rows(turn, messages, x, ids)
            parts = _split(messages, others)
        turn.came = self._messages(rows.shape[0] - (own[1] - own[0]))
        came = {rank: stride for rank in self._sources if self._owns and (rank != self._rank or x is None)}
        places = _split(turn.came, came)
        self._all_to_all({rank: places[rank] for rank in self._others_named() if self._owns}, parts)
        if self._owns:
            self._unpack(turn, stride)
        return turn

    def _answer_padded(self, expert_rows: torch.Tensor, turn: "_Turn") -> torch.Tensor:
        """[rows of the other owners, top_k, hidden]."""
        stride, shape = self._stride, self._shape
        others = {rank: stride for rank in self._owners if turn.where is not None and rank != self._rank}
        answers = expert_rows.new_empty(len(others) * stride, shape.top_k, shape.hidden_size)
        parts = {}
        if self._owns:
            made = _split(expert_rows, dict.fromkeys(self._sources, stride))
            parts = {rank: made[rank] for rank in self._others_named()}
        self._all_to_all(_split(answers, others), parts)
        return answers

    def _answer_bounded(self, expert_rows: torch.Tensor, turn: "_Turn") -> torch.Tensor:
        """[places of the other owners, hidden]."""
        hidden, bound = self._shape.hidden_size, turn.bound
        others = {rank: bound for rank in self._owners if turn.where is not None and rank != self._rank}
        answers = expert_rows.new_empty(len(others) * bound, hidden)
        parts = {}
        if self._owns and self._others_named():
            assert turn.came_pairs is not None
            sources = [rank for rank in self._sources if rank != self._rank]
            made = expert_rows.new_empty(len(sources) * bound, hidden)
            self._pack.pack_bounded(
                expert_rows, turn.slots, turn.came_pairs, made, stride=self._stride, bound=bound, named=self._named
            )
            places = _split(made, dict.fromkeys(sources, bound))
            parts = {rank: places[rank] for rank in self._others_named()}
        self._all_to_all(_split(answers, others), parts)
        return answers

    def _dispatch_exact(self, x: torch.Tensor | None, ids: torch.Tensor | None) -> "_Turn":
        num_owners = len(self._owners)
        counts = torch.zeros(num_owners + len(self._sources), 2, dtype=torch.int32, device=self._shape.device)
        places = None
        if x is not None:
            assert ids is not None
            places = counts.new_empty(num_owners, x.shape[0], 2)
            self._pack.count(ids, self._table, self._facts, places, counts, layer_id=self._layer_id)
        send = {rank: counts[p] for p, rank in enumerate(self._owners) if x is not None and rank != self._rank}
        receive = {rank: counts[num_owners + self._sources.index(rank)] for rank in self._others_named() if self._owns}
        self._all_to_all(receive, send)
        go, come = self._read(counts)
        own = (0, 0)
        if self._owns and x is not None:
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
        if self._owns:
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
            pairs=turn.sent_pairs,
        )

    def _unpack(self, turn: "_Turn", stride: int) -> None:
        assert turn.came is not None
        self._pack.unpack(
            turn.came,
            self._facts,
            turn.rows,
            turn.slots,
            own=turn.own,
            stride=stride,
            named=self._named,
            pairs=turn.came_pairs,
        )

    def _others_named(self) -> list[int]:
        return [r for i, r in enumerate(self._sources) if self._named >> i & 1 and r != self._rank]

    def _rows(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self._shape
        rows = torch.empty(num_rows, shape.hidden_size, dtype=shape.dtype, device=shape.device)
        return rows, torch.empty(num_rows, shape.top_k, dtype=torch.int32, device=shape.device)

    def _messages(self, num_rows: int) -> torch.Tensor:
        return torch.empty(num_rows, self._sizes.message_bytes, dtype=torch.uint8, device=self._shape.device)

    def _pairs(self, num_ranks: int) -> torch.Tensor:
        return torch.empty(num_ranks, pairs_pitch(self._stride), dtype=torch.uint8, device=self._shape.device)

    def _read(self, counts: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """[rows, pairs] to each owner, and of each source: the host sync of the exact form, with a deadline."""
        host = counts
        if counts.is_cuda:
            host = self._counts
            host.copy_(counts.flatten(), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._wait(event)
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
    bound: int = 0  # bounded form only, as the next two
    sent_pairs: torch.Tensor | None = None  # [owners, pitch] uint8: pairs of each token
    came_pairs: torch.Tensor | None = None  # [sources, pitch] uint8
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


def pinned(size: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """On the host, for copies from `device`."""
    return torch.empty(size, dtype=dtype, pin_memory=device.type == "cuda")
