"""The exchange of CPU processes: one message each way per layer and pair of ranks, over a ProcessGroupGloo.

The messages and what is checked in them: `gloo_messages.py`.

What makes it quick: a Gloo send flows at once only if the peer's receive is posted. So an owner of experts posts the
next layer's receive as soon as it has answered, and a source posts those of its answers while its rows are on their
way; neither is on the critical path. Rows are gathered straight into the message; buffers live as long as the group.

Traps: wait on receives, never on sends (a send-wait does not notice a dead peer). A message is known to be taken when
a later answer of that peer arrives; its buffer is not written before. Tags name step, layer and direction."""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import NoReturn

import numpy as np
import torch
from torch.distributed import ProcessGroup, Work

from ..errors import ExchangeError, ExchangeTimeout, PeerLost
from .dispatch import DispatchPlan
from .epoch import Epoch, StepHeader
from .exchange import ExchangeHandle, RowShape
from .gloo_messages import HEAD_DAMAGED, HEAD_WORDS, MAGIC, Inbox, Outbox, head_is_whole, rows_at, status_of
from .group import abort_gloo
from .guard import BadRow, Direction, Fault, Int64Array, checksums, row_checksums

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
        self._shard_ids = [epoch.members[peer].member_id for peer in epoch.expert_ranks]
        self._ep_rank = self._expert_ranks.index(rank) if rank in self._expert_ranks else -1
        self._timeout_base_s, self._timeout_per_row_s = timeout_base_s, timeout_per_row_s
        self._row_words = shape.hidden_size * shape.dtype.itemsize // 4
        assert self._row_words * 4 == shape.hidden_size * shape.dtype.itemsize, "rows are whole 32-bit words"
        self._outboxes = {peer: Outbox() for peer in self._expert_ranks if peer != rank}
        self._inboxes: dict[int, Inbox] = {}
        self._all_sources: tuple[int, ...] = ()  # sources of this step in rank order, where this rank owns experts
        self._no_slots = torch.empty(0, shape.top_k, dtype=torch.int32)
        self._layers: Sequence[int] = ()
        self._turn = 0
        self._is_source = False
        self._step_id = 0
        self._deadline = timedelta(seconds=timeout_base_s)
        self._returns = torch.empty(0, shape.hidden_size, dtype=shape.dtype)
        self._aborted = False
        self._seen: list[BadRow] = []  # in other ranks' rows, in this step

    def begin(self, header: StepHeader, layers: Sequence[int]) -> None:
        self._step_id, self._epoch = header.step_id, header.epoch
        self._layers, self._turn = layers, 0
        rows = sum(header.num_tokens)
        self._deadline = timedelta(seconds=self._timeout_base_s + self._timeout_per_row_s * rows)
        self._seen = []
        self._is_source = header.num_tokens[self._rank] > 0
        for outbox in self._outboxes.values():
            outbox.answer_sums.clear()
        self._all_sources = header.sources if self._ep_rank >= 0 else ()
        for source in self._remote_sources():
            inbox = self._inboxes.setdefault(source, Inbox())
            inbox.reserve(self._message_words(header.num_tokens[source]))
            inbox.statuses.clear()
            inbox.answer_sums.clear()
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
                continue
            inbox = self._inboxes[source]
            inbox.answered_rows = part
            if inbox.unchecked is None:  # its head was damaged
                part = torch.zeros(1, self._shape.hidden_size, dtype=self._shape.dtype)
            if part.shape[0]:
                # The rows stay referenced until the source is heard again, which proves that it has them.
                inbox.answer = (part, self._send(part, source, tag))
        for source in self._remote_sources():  # while the sources read their answers
            self._check(source, handle.layer_id)
        if self._turn + 1 < len(self._layers):
            for source in self._remote_sources():
                self._post(source, self._turn + 1)
        else:
            self._send_verdicts()
        if plan is not None:
            self._receive_answers(plan, own)
        self._turn += 1
        return None if plan is None else self._returns[: plan.num_pairs]

    def verify(self) -> list[BadRow]:
        bad = self._seen
        if self._is_source:
            for ep_rank, peer in enumerate(self._expert_ranks):
                if peer != self._rank:
                    outbox = self._outboxes[peer]
                    assert outbox.verdict is not None
                    message, work = outbox.verdict
                    self._wait(work, peer)
                    outbox.verdict = None
                    bad += self._judge(ep_rank, message.numpy(), outbox.answer_sums)
        return bad

    def abort(self) -> None:
        if not self._aborted:
            self._aborted = True
            abort_gloo(self._group)

    # -- a source's half

    def _send_rows(self, plan: DispatchPlan, x: torch.Tensor) -> None:
        """Send each rank its rows, then, while they are on their way, post the receives of the answers."""
        if self._returns.shape[0] < plan.num_pairs:  # zeros: where an answer fails to come nothing must look like one
            self._returns = self._returns.new_zeros(plan.num_pairs, self._shape.hidden_size)
        tag, answer_tag = self._tag(0, self._turn), self._tag(1, self._turn)
        words = x.contiguous().view(torch.int32).numpy()
        sums = checksums(words)
        row = pair = 0
        for ep_rank, peer in enumerate(self._expert_ranks):
            rows = slice(row, row + plan.send_counts[ep_rank])
            if peer != self._rank:
                outbox = self._outboxes[peer]
                message = outbox.fill(plan, rows, plan.pair_counts[ep_rank], self._step_id, words, sums)
                outbox.sent(message, self._send(message, peer, tag))
            row = rows.stop
        for ep_rank, peer in enumerate(self._expert_ranks):
            num_pairs = plan.pair_counts[ep_rank]
            if peer != self._rank and num_pairs:
                self._outboxes[peer].awaited = self._recv(self._returns[pair : pair + num_pairs], peer, answer_tag)
            pair += num_pairs
        if self._turn + 1 == len(self._layers):
            self._post_verdicts(plan)

    def _post_verdicts(self, last: DispatchPlan) -> None:
        """All pair counts of the step are known now, and so are the sizes of the shards' verdicts."""
        for ep_rank, peer in enumerate(self._expert_ranks):
            if peer != self._rank:
                outbox = self._outboxes[peer]
                num_sums = sum(map(len, outbox.answer_sums)) + last.pair_counts[ep_rank]
                message = torch.zeros(1 + len(self._layers) + num_sums, dtype=torch.int64)
                outbox.verdict = (message, self._recv(message, peer, self._tag(1, len(self._layers))))

    def _receive_answers(self, plan: DispatchPlan, own: torch.Tensor | None) -> None:
        pair = 0
        for ep_rank, peer in enumerate(self._expert_ranks):
            num_pairs = plan.pair_counts[ep_rank]
            rows = self._returns[pair : pair + num_pairs]
            pair += num_pairs
            if peer == self._rank:
                if own is not None:
                    rows.copy_(own)
                continue
            outbox = self._outboxes[peer]
            if num_pairs:
                assert outbox.awaited is not None
                self._wait(outbox.awaited, peer)
                outbox.answered()
            outbox.answer_sums.append(row_checksums(rows))

    def _judge(self, ep_rank: int, verdict: Int64Array, received: Sequence[Int64Array]) -> Iterator[BadRow]:
        """A shard's verdict on this rank's rows, and its answers' checksums against those of what came here."""
        num_layers = len(self._layers)
        if int(checksums(verdict[1:].view(np.int32)[None])[0]) != int(verdict[0]):
            yield self._bad(Fault.HEAD, Direction.RETURN, self._rank, ep_rank, self._layers[-1])
            return
        statuses, sent = verdict[1 : 1 + num_layers].tolist(), verdict[1 + num_layers :]
        if not any(statuses) and np.array_equal(np.concatenate(received), sent):
            return
        start = 0
        for layer_id, status, sums in zip(self._layers, statuses, received, strict=True):
            if status:
                yield self._status_as_bad_row(status, self._rank, ep_rank, layer_id)
            if status != HEAD_DAMAGED:  # else nothing was computed
                expected = sent[start : start + len(sums)]
                start += len(sums)
                for row in (expected != sums).nonzero()[0].tolist():
                    yield self._bad(Fault.DAMAGED, Direction.RETURN, self._rank, ep_rank, layer_id, row)

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
            inbox.verdict = None
            parts.append(self._open(inbox, source, layer_id))
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

    def _open(self, inbox: "Inbox", source: int, layer_id: int) -> tuple[int, torch.Tensor, torch.Tensor, int]:
        """Check and unpack one message. One with a damaged head counts as empty: its layout cannot be believed."""
        words = inbox.buffer.numpy()
        magic, num_rows, num_pairs, sent_layer, sent_step = words[:5].tolist()
        top_k = self._shape.top_k
        start = rows_at(num_rows, top_k)
        inbox.unchecked = None
        is_whole = head_is_whole(words, num_rows, top_k, start + num_rows * self._row_words)
        if not is_whole:
            num_rows = num_pairs = start = 0
        elif magic != MAGIC or sent_layer != layer_id or sent_step != self._step_id & 0x7FFFFFFF:
            self.abort()
            raise self._error(
                ExchangeError, f"rank {source} sent layer {sent_layer} of step {sent_step}: out of turn", source
            )
        slots_at = HEAD_WORDS + 2 * num_rows
        slot_ids = words[slots_at : slots_at + num_rows * top_k].reshape(num_rows, top_k)
        row_words = words[start : start + num_rows * self._row_words].reshape(num_rows, self._row_words)
        rows = torch.from_numpy(row_words).view(self._shape.dtype)
        if is_whole:
            inbox.unchecked = rows, row_words, words[HEAD_WORDS:slots_at].view(np.int64)
        return source, rows, torch.from_numpy(slot_ids), num_pairs

    def _check(self, source: int, layer_id: int) -> None:
        """The rows of one message, and the checksums of what answered them: after the answer has left, since nobody
        waits for this before the verdict, and before the next message comes into the same buffer."""
        inbox = self._inboxes[source]
        status = HEAD_DAMAGED if inbox.unchecked is None else status_of(*inbox.unchecked)
        inbox.statuses.append(status)
        inbox.answer_sums.append(row_checksums(inbox.answered_rows))
        if status:
            self._seen.append(self._status_as_bad_row(status, source, self._ep_rank, layer_id))

    def _send_verdicts(self) -> None:
        for source in self._remote_sources():
            inbox = self._inboxes[source]
            parts = [np.zeros(1, np.int64), np.array(inbox.statuses, np.int64), *inbox.answer_sums]
            verdict = np.concatenate(parts)
            verdict[0] = checksums(verdict[1:].view(np.int32)[None])[0]
            message = torch.from_numpy(verdict)
            inbox.verdict = (message, self._send(message, source, self._tag(1, len(self._layers))))

    def _post(self, source: int, turn: int) -> None:
        inbox = self._inboxes[source]
        inbox.posted = self._recv(inbox.buffer, source, self._tag(0, turn))

    # -- both

    def _message_words(self, num_rows: int) -> int:
        return rows_at(num_rows, self._shape.top_k) + num_rows * self._row_words

    def _tag(self, direction: int, turn: int) -> int:
        """`turn` = len(layers) is the verdict's."""
        return ((self._step_id * (len(self._layers) + 1) + turn) * 2 + direction) % _TAG_SPACE

    def _remote_sources(self) -> list[int]:
        return [source for source in self._all_sources if source != self._rank]

    def _status_as_bad_row(self, status: int, source: int, ep_rank: int, layer_id: int) -> BadRow:
        if status == HEAD_DAMAGED:
            return self._bad(Fault.HEAD, Direction.DISPATCH, source, ep_rank, layer_id)
        fault = Fault.NOT_FINITE if status & 1 else Fault.DAMAGED
        return self._bad(fault, Direction.DISPATCH, source, ep_rank, layer_id, status // 2 - 1)

    def _bad(
        self, fault: Fault, direction: Direction, source: int, ep_rank: int, layer_id: int, row: int = -1
    ) -> BadRow:
        shard = self._shard_ids[ep_rank]
        return BadRow(
            fault=fault, direction=direction, source=source, ep_rank=ep_rank, layer_id=layer_id, row=row, shard=shard
        )

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
            peer=peer,
        )
