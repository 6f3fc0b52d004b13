"""The messages of the Gloo exchange: their layout, what is checked in them, and the buffers that hold them.

A dispatch message is one run of int32 words: 16 words of head (magic, rows, pairs, layer, step, and the checksum of
all words before the rows), the rows' checksums, the slot ids, the rows' bytes from a multiple of 64 bytes on. Counts so
travel with the rows: a Gloo receive accepts a message shorter than its buffer, and the header bounds the buffer. The
answer is the bare rows, whose number the source knows, received where they will be read.

The checksums of the answers come once a step, in the **verdict** that a shard sends to each source after the last
layer, with what it found wrong in the dispatched rows: one small message a step instead of one a layer. A message whose
head is damaged is answered with one row of zeros, since nothing in it can be believed."""

import numpy as np
import torch
from torch.distributed import Work

from .dispatch import DispatchPlan
from .guard import Int32Array, Int64Array, all_finite, checksums, non_finite_rows

HEAD_WORDS = 16  # 64 bytes, so that rows are aligned
_SUM_WORDS = slice(14, 16)  # of the head: the checksum of everything before the rows, computed with 0 here
MAGIC = 0x454D5832
# What a shard says of one turn's dispatch: 0 all is well, -1 the head is damaged, else 1 + the first bad row, doubled,
# and + 1 where that row is as it was sent but not finite.
HEAD_DAMAGED = -1


class Inbox:
    """What one source sends here. Its receive is posted when the rows of the layer before have been multiplied."""

    __slots__ = ("answer", "answer_sums", "answered_rows", "buffer", "posted", "statuses", "unchecked", "verdict")

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.int32)
        self.posted: Work | None = None
        self.answer: tuple[torch.Tensor, Work] | None = None  # kept until the source is heard again
        self.verdict: tuple[torch.Tensor, Work] | None = None  # likewise
        self.unchecked: tuple[torch.Tensor, Int32Array, Int64Array] | None = None  # arguments of `status_of`
        self.answered_rows = torch.empty(0)
        self.statuses: list[int] = []  # of each turn's dispatch
        self.answer_sums: list[Int64Array] = []  # [pairs] of each turn's answer

    def reserve(self, num_words: int) -> None:
        if self.buffer.numel() < num_words:
            self.buffer = torch.empty(num_words, dtype=torch.int32)


class Outbox:
    """What goes to one expert rank. A buffer is written again only after the peer answered; until then it is kept and
    another one is taken (an empty message has no answer)."""

    __slots__ = ("_array", "_buffer", "_kept", "answer_sums", "awaited", "verdict")

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.int32)
        self._array = self._buffer.numpy()
        self._kept: list[tuple[torch.Tensor, Work]] = []
        self.awaited: Work | None = None  # the answer's receive
        self.answer_sums: list[Int64Array] = []  # [pairs] of what came in each turn
        self.verdict: tuple[torch.Tensor, Work] | None = None

    def fill(
        self, plan: DispatchPlan, rows: slice, num_pairs: int, step_id: int, words: Int32Array, sums: Int64Array
    ) -> torch.Tensor:
        """Write the message for the plan's `rows` of the batch `words` [num_tokens, row_words], with its checksums."""
        num_rows, row_words = rows.stop - rows.start, words.shape[1]
        start = rows_at(num_rows, plan.top_k)
        end = start + num_rows * row_words
        if self._kept or self._buffer.numel() < end:
            self._buffer = torch.empty(end, dtype=torch.int32)
            self._array = self._buffer.numpy()
        array = self._array
        array[:HEAD_WORDS] = 0
        array[:5] = (MAGIC, num_rows, num_pairs, plan.layer_id, step_id & 0x7FFFFFFF)
        slots_at = HEAD_WORDS + 2 * num_rows
        slots_end = slots_at + num_rows * plan.top_k
        if num_rows:
            tokens = plan.row_to_token[rows]
            array[HEAD_WORDS:slots_at].view(np.int64)[:] = sums[tokens]
            array[slots_at:slots_end] = plan.row_slot_ids[rows].reshape(-1)
            words.take(tokens, axis=0, out=array[start:end].reshape(num_rows, row_words), mode="clip")
        array[slots_end:start] = 0
        array[_SUM_WORDS].view(np.int64)[:] = checksums(array[None, :start])
        return self._buffer[:end]

    def sent(self, message: torch.Tensor, work: Work) -> None:
        self._kept.append((message, work))

    def answered(self) -> None:
        self.awaited = None
        self._kept.clear()


def rows_at(num_rows: int, top_k: int) -> int:
    """Word at which the rows begin: behind head, checksums and slot ids, at a multiple of 64 bytes."""
    return HEAD_WORDS + (num_rows * (2 + top_k) + 15) // 16 * 16


def head_is_whole(words: Int32Array, num_rows: int, top_k: int, end: int) -> bool:
    """Everything before the rows, padding included: no bit of a message is unchecked."""
    if num_rows < 0 or end > len(words):
        return False
    before = words[: rows_at(num_rows, top_k)].copy()
    claimed = int(before[_SUM_WORDS].view(np.int64)[0])
    before[_SUM_WORDS] = 0
    return int(checksums(before[None])[0]) == claimed


def status_of(rows: torch.Tensor, words: Int32Array, claimed: Int64Array) -> int:
    """See HEAD_DAMAGED."""
    sums = checksums(words)
    if not np.array_equal(sums, claimed):
        return 2 * (1 + int((sums != claimed).nonzero()[0][0]))
    if not all_finite(rows):
        return 2 * (1 + non_finite_rows(rows)[0]) + 1
    return 0
