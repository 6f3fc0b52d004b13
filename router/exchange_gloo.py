"""The exchange of CPU processes: one message each way per layer and pair of ranks, over a ProcessGroupGloo.

A dispatch message is one run of int32 words: 16 words of head (magic, rows, pairs, layer, step), the slot ids, the
rows' bytes from a multiple of 64 bytes on. Counts so travel with the rows: a Gloo receive accepts a message shorter
than its buffer, and the header bounds the buffer. The answer is the bare rows, whose number the source knows.

What makes it quick: a Gloo send flows at once only if the peer's receive is posted. So an owner of experts posts the
next layer's receive as soon as it has answered, and a source posts those of its answers while its rows are on their
way; neither is on the critical path. Rows are gathered straight into the message; buffers live as long as the group.

Traps: wait on receives, never on sends (a send-wait does not notice a dead peer). A message is known to be taken when
a later answer of that peer arrives; its buffer is not written before. Tags name step, layer and direction."""

from collections.abc import Sequence
from datetime import timedelta
from typing import NoReturn

import torch
from torch.distributed import ProcessGroup, Work

from ..errors import ExchangeError, ExchangeTimeout, PeerLost
from .dispatch import DispatchPlan
from .epoch import Epoch, StepHeader
from .exchange import ExchangeHandle, RowShape
from .group import abort_gloo
from .placement import Int32Array

_HEAD_WORDS = 16  # 64 bytes, so that rows are aligned
_MAGIC = 0x454D5831
_TAG_SPACE = 1 << 30


class GlooExchange:
    """One communicator; serves every epoch of the same membership."""

    def __init__(
        self,
        group: ProcessGroup,
        epoch: Epoch,
        rank: int,
        shape: RowShape,
        *,
        timeout_base_s: float,
        timeout_per_row_s: float,
    ) -> None:
        self._group, self._rank, self._shape, self._epoch = group, rank, shape, epoch.number
        self._expert_ranks = epoch.expert_ranks
        self._ep_rank = self._expert_ranks.index(rank) if rank in self._expert_ranks else -1
        self._timeout_base_s, self._timeout_per_row_s = timeout_base_s, timeout_per_row_s
        self._row_words = shape.hidden_size * shape.dtype.itemsize // 4
        assert self._row_words * 4 == shape.hidden_size * shape.dtype.itemsize, "rows are whole 32-bit words"
        self._outboxes = {peer: _Outbox() for peer in self._expert_ranks if peer != rank}
        self._inboxes: dict[int, _Inbox] = {}
        self._all_sources: tuple[int, ...] = ()  # sources of this step in rank order, where this rank owns experts
        self._no_slots = torch.empty(0, shape.top_k, dtype=torch.int32)
        self._layers: Sequence[int] = ()
        self._turn = 0
        self._step_id = 0
        self._deadline = timedelta(seconds=timeout_base_s)
        self._returns = torch.empty(0, shape.hidden_size, dtype=shape.dtype)
        self._aborted = False

    def begin(self, header: StepHeader, layers: Sequence[int]) -> None:
        self._step_id, self._epoch = header.step_id, header.epoch
        self._layers, self._turn = layers, 0
        rows = sum(header.num_tokens)
        self._deadline = timedelta(seconds=self._timeout_base_s + self._timeout_per_row_s * rows)
        self._all_sources = header.sources if self._ep_rank >= 0 else ()
        for source in self._all_sources:
            if source != self._rank:
                self._inboxes.setdefault(source, _Inbox()).reserve(self._message_words(header.num_tokens[source]))
                self._post(source, 0)

    def dispatch(self, layer_id: int, plan: DispatchPlan | None, x: torch.Tensor | None) -> ExchangeHandle:
        if self._aborted:
            raise self._error(PeerLost, "the exchange was aborted", -1)
        if plan is not None:
            assert x is not None
            self._send_rows(plan, x)
        return self._receive_rows(layer_id, plan, x)

    def combine(self, expert_rows: torch.Tensor, handle: ExchangeHandle) -> torch.Tensor | None:
        plan, own = handle.plan, None
        tag = self._tag(1, self._turn)
        start = 0
        for source, _, num_pairs in handle.source_counts:
            part = expert_rows[start : start + num_pairs]
            start += num_pairs
            if source == self._rank:
                own = part
            elif num_pairs:
                # The rows stay referenced until the source is heard again, which proves that it has them.
                self._inboxes[source].answer = (part, self._send(part, source, tag))
        if self._turn + 1 < len(self._layers):  # while the sources read their answers
            for source in self._all_sources:
                if source != self._rank:
                    self._post(source, self._turn + 1)
        if plan is not None:
            self._receive_answers(plan, own)
        self._turn += 1
        return None if plan is None else self._returns[: plan.num_pairs]

    def abort(self) -> None:
        if not self._aborted:
            self._aborted = True
            abort_gloo(self._group)

    # -- a source's half

    def _send_rows(self, plan: DispatchPlan, x: torch.Tensor) -> None:
        """Send each rank its rows, then, while they are on their way, post the receives of the answers."""
        if self._returns.shape[0] < plan.num_pairs:
            self._returns = self._returns.new_empty(plan.num_pairs, self._shape.hidden_size)
        tag, answer_tag = self._tag(0, self._turn), self._tag(1, self._turn)
        words = x.contiguous().view(torch.int32).numpy()
        row = pair = 0
        for ep_rank, peer in enumerate(self._expert_ranks):
            rows = slice(row, row + plan.send_counts[ep_rank])
            if peer != self._rank:
                outbox = self._outboxes[peer]
                message = outbox.fill(plan, rows, plan.pair_counts[ep_rank], self._step_id, words)
                outbox.sent(message, self._send(message, peer, tag))
            row = rows.stop
        for ep_rank, peer in enumerate(self._expert_ranks):
            num_pairs = plan.pair_counts[ep_rank]
            if peer != self._rank and num_pairs:
                self._outboxes[peer].awaited = self._recv(self._returns[pair : pair + num_pairs], peer, answer_tag)
            pair += num_pairs

    def _receive_answers(self, plan: DispatchPlan, own: torch.Tensor | None) -> None:
        pair = 0
        for ep_rank, peer in enumerate(self._expert_ranks):
            num_pairs = plan.pair_counts[ep_rank]
            if peer == self._rank:
                if own is not None:
                    self._returns[pair : pair + num_pairs] = own
            elif num_pairs:
                outbox = self._outboxes[peer]
                assert outbox.awaited is not None
                self._wait(outbox.awaited, peer)
                outbox.answered()
            pair += num_pairs

    # -- an expert rank's half

    def _receive_rows(self, layer_id: int, plan: DispatchPlan | None, x: torch.Tensor | None) -> ExchangeHandle:
        parts: list[tuple[int, torch.Tensor, torch.Tensor, int]] = []  # (source rank, rows, slot ids, pairs)
        for source in self._all_sources:
            if source == self._rank:
                assert plan is not None
                assert x is not None
                parts.append(self._own_part(plan, x))
                continue
            inbox = self._inboxes[source]
            assert inbox.posted is not None
            self._wait(inbox.posted, source)
            inbox.answer = None  # heard again: it has our last answer
            parts.append(self._open(inbox.buffer, source, layer_id))
        if not parts:
            return ExchangeHandle(layer_id, plan, self._returns[:0], self._no_slots)
        counts = tuple((source, rows.shape[0], num_pairs) for source, rows, _, num_pairs in parts)
        if len(parts) == 1:
            return ExchangeHandle(layer_id, plan, parts[0][1], parts[0][2], counts)
        rows, slot_ids = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
        return ExchangeHandle(layer_id, plan, rows, slot_ids, counts)

    def _own_part(self, plan: DispatchPlan, x: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor, int]:
        start = sum(plan.send_counts[: self._ep_rank])
        mine = slice(start, start + plan.send_counts[self._ep_rank])
        rows = x.index_select(0, torch.from_numpy(plan.row_to_token[mine]))
        return self._rank, rows, torch.from_numpy(plan.row_slot_ids[mine]), plan.pair_counts[self._ep_rank]

    def _open(self, buffer: torch.Tensor, source: int, layer_id: int) -> tuple[int, torch.Tensor, torch.Tensor, int]:
        words = buffer.numpy()
        magic, num_rows, num_pairs, sent_layer, sent_step = words[:5].tolist()
        if magic != _MAGIC or sent_layer != layer_id or sent_step != self._step_id & 0x7FFFFFFF:
            self.abort()
            raise self._error(
                ExchangeError, f"rank {source} sent layer {sent_layer} of step {sent_step}: out of turn", source
            )
        top_k, start = self._shape.top_k, _rows_at(num_rows, self._shape.top_k)
        slot_ids = words[_HEAD_WORDS : _HEAD_WORDS + num_rows * top_k].reshape(num_rows, top_k)
        rows = words[start : start + num_rows * self._row_words].reshape(num_rows, self._row_words)
        return source, torch.from_numpy(rows).view(self._shape.dtype), torch.from_numpy(slot_ids), num_pairs

    def _post(self, source: int, turn: int) -> None:
        inbox = self._inboxes[source]
        inbox.posted = self._recv(inbox.buffer, source, self._tag(0, turn))

    # -- both

    def _message_words(self, num_rows: int) -> int:
        return _rows_at(num_rows, self._shape.top_k) + num_rows * self._row_words

    def _tag(self, direction: int, turn: int) -> int:
        return ((self._step_id * len(self._layers) + turn) * 2 + direction) % _TAG_SPACE

    def _send(self, tensor: torch.Tensor, peer: int, tag: int) -> Work:
        try:
            return self._group.send([tensor], peer, tag)
        except RuntimeError as error:
            self._fail(error, peer)

    def _recv(self, tensor: torch.Tensor, peer: int, tag: int) -> Work:
        try:
            return self._group.recv([tensor], peer, tag)
        except RuntimeError as error:
            self._fail(error, peer)

    def _wait(self, work: Work, peer: int) -> None:
        try:
            work.wait(self._deadline)
        except RuntimeError as error:
            self._fail(error, peer)

    def _fail(self, error: RuntimeError, peer: int) -> NoReturn:
        """Abort at once, so that the others of this step learn in milliseconds rather than at their deadlines."""
        self.abort()
        text = str(error)
        if "timed out" in text.lower() or "timeout" in text.lower():
            deadline_s = self._deadline.total_seconds()
            raise self._error(ExchangeTimeout, f"rank {peer} sent nothing for {deadline_s:.1f} s", peer) from error
        raise self._error(PeerLost, f"rank {peer} is gone: {text.splitlines()[0][:160]}", peer) from error

    def _error(self, kind: type[ExchangeError], message: str, peer: int) -> ExchangeError:
        return kind(
            message,
            ep_rank=self._expert_ranks.index(peer) if peer in self._expert_ranks else -1,
            layer_id=self._layers[self._turn] if self._turn < len(self._layers) else -1,
            step_id=self._step_id,
            epoch=self._epoch,
        )


class _Inbox:
    """What one source sends here. Its receive is posted when the rows of the layer before have been multiplied."""

    __slots__ = ("answer", "buffer", "posted")

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.int32)
        self.posted: Work | None = None
        self.answer: tuple[torch.Tensor, Work] | None = None  # kept until the source is heard again

    def reserve(self, num_words: int) -> None:
        if self.buffer.numel() < num_words:
            self.buffer = torch.empty(num_words, dtype=torch.int32)


class _Outbox:
    """What goes to one expert rank. A buffer is written again only after the peer answered; until then it is kept and
    another one is taken (an empty message has no answer)."""

    __slots__ = ("_array", "_buffer", "_kept", "awaited")

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.int32)
        self._array = self._buffer.numpy()
        self._kept: list[tuple[torch.Tensor, Work]] = []
        self.awaited: Work | None = None  # the answer's receive

    def fill(self, plan: DispatchPlan, rows: slice, num_pairs: int, step_id: int, words: Int32Array) -> torch.Tensor:
        """Write the message for the plan's `rows`; `words` [num_tokens, row_words] is the batch."""
        num_rows, row_words = rows.stop - rows.start, words.shape[1]
        start = _rows_at(num_rows, plan.top_k)
        end = start + num_rows * row_words
        if self._kept or self._buffer.numel() < end:
            self._buffer = torch.empty(end, dtype=torch.int32)
            self._array = self._buffer.numpy()
        array = self._array
        array[:5] = (_MAGIC, num_rows, num_pairs, plan.layer_id, step_id & 0x7FFFFFFF)
        if num_rows:
            array[_HEAD_WORDS : _HEAD_WORDS + num_rows * plan.top_k] = plan.row_slot_ids[rows].reshape(-1)
            gathered = array[start:end].reshape(num_rows, row_words)
            words.take(plan.row_to_token[rows], axis=0, out=gathered, mode="clip")
        return self._buffer[:end]

    def sent(self, message: torch.Tensor, work: Work) -> None:
        self._kept.append((message, work))

    def answered(self) -> None:
        self.awaited = None
        self._kept.clear()


def _rows_at(num_rows: int, top_k: int) -> int:
    """Word at which the rows begin: behind head and slot ids, at a multiple of 64 bytes."""
    return _HEAD_WORDS + (num_rows * top_k + 15) // 16 * 16
