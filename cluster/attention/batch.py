"""Scheduled sequences -> the tensors of one step.

Everything that varies in length is flat (`T` tokens of `R` requests, no padding) except the block table. Built with
numpy on the host in a constant number of array operations plus one slice a request."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
import torch

from .sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledTokens:
    """Tokens `start` to `end` of a sequence run in this step."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool  # the last known token is among them, so a next one is drawn

    @classmethod
    def next_of(cls, sequence: Sequence, num_tokens: int) -> "ScheduledTokens":
        """The first `num_tokens` of its pending tokens."""
        return cls(
            sequence=sequence,
            start=sequence.num_computed_tokens,
            num_tokens=num_tokens,
            samples=num_tokens == sequence.num_pending_tokens,
        )

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """One step of one attention replica: `T` new tokens of `R` requests, request after request."""

    token_ids: torch.Tensor  # [T] int64, sequence.UNSEEN where a step in flight draws the token
    positions: torch.Tensor  # [T] int64
    slot_mapping: torch.Tensor  # [T] int64, block_id * block_size + offset; -1 = do not write
    q_lens: torch.Tensor  # [R] int32, new tokens of each request
    seq_lens: torch.Tensor  # [R] int32, tokens in KV after this step
    cu_seqlens_q: torch.Tensor  # [R + 1] int32, prefix sums of q_lens, first 0
    block_table: torch.Tensor  # [R, max_num_blocks] int32, -1 padded
    logits_rows: torch.Tensor  # [S] int64, rows of T whose logits are needed

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_reqs(self) -> int:
        return self.q_lens.shape[0]


def build(scheduled: Seq[ScheduledTokens], *, block_size: int, device: torch.device | str = "cpu") -> StepBatch:
    """The batch of `scheduled`, in its order; `logits_rows` follow the order of those that sample."""
    num_reqs = len(scheduled)
    q_lens = np.fromiter((s.num_tokens for s in scheduled), np.int32, num_reqs)
    starts = np.fromiter((s.start for s in scheduled), np.int64, num_reqs)
    samples = np.fromiter((s.samples for s in scheduled), np.bool_, num_reqs)
    cu_seqlens_q = np.zeros(num_reqs + 1, dtype=np.int32)
    np.cumsum(q_lens, out=cu_seqlens_q[1:])
    num_tokens = int(cu_seqlens_q[-1])
    seq_lens = starts + q_lens

    block_table = np.full((num_reqs, max((s.sequence.table.num_blocks for s in scheduled), default=0)), -1, np.int32)
    token_ids = np.empty(num_tokens, dtype=np.int64)
    begin = 0
    for row, item in enumerate(scheduled):
        sequence, count = item.sequence, item.num_tokens
        token_ids[begin : begin + count] = sequence.token_ids[item.start : item.end]
        table = sequence.table
        block_table[row, : table.num_blocks] = table.block_ids[: table.num_blocks]
        begin += count

    row_of_token = np.repeat(np.arange(num_reqs), q_lens)
    positions = np.arange(num_tokens) - cu_seqlens_q[row_of_token] + starts[row_of_token]
    blocks, offsets = np.divmod(positions, block_size)
    slot_mapping = block_table[row_of_token, blocks].astype(np.int64) * block_size + offsets
    assert num_tokens == 0 or slot_mapping.min() >= 0, "a scheduled token has no block"
    logits_rows = cu_seqlens_q[1:][samples].astype(np.int64) - 1

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return StepBatch(
        token_ids=tensor(token_ids),
        positions=tensor(positions),
        slot_mapping=tensor(slot_mapping),
        q_lens=tensor(q_lens),
        seq_lens=tensor(seq_lens.astype(np.int32)),
        cu_seqlens_q=tensor(cu_seqlens_q),
        block_table=tensor(block_table),
        logits_rows=tensor(logits_rows),
    )


def with_seen_tokens(batch: StepBatch, scheduled: Seq[ScheduledTokens]) -> StepBatch:
    """The batch for another run: the same blocks, whoever has them now, and tokens that have been seen meanwhile."""
    parts = [item.sequence.token_ids[item.start : item.end] for item in scheduled]
    token_ids = torch.from_numpy(np.concatenate(parts)).to(batch.token_ids.device)
    return replace(batch, token_ids=token_ids)
