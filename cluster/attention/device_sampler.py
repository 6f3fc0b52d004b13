"""The sampler of a GPU engine: what decides a row stays on the device, so steps follow each other without the host.

A running sequence has a slot. `admit` stages what the host knows of it, `upload` sends all that is staged in one copy.
From then on `sample`, in a captured graph too, moves the slot on by each token that it chooses: the draw's position,
the thinking budget's fold, and `last_token`, which the next step's embedding reads. Rules that look at the sequence's
own tokens or at text (penalties, grammars, log probabilities, stop ids before min_tokens) stay with `sampler.py`:
`needs_host` says so, and such a step is sampled there.

A slot moves on with every `sample`, whether or not the step counts in the end. Whoever runs a step again, or samples a
step on the host, admits its sequences again: the host's record is the truth. Slots are admitted when no step in flight
draws for them."""

import numpy as np
import torch

from ...kernels.sample import MAX_CLOSING, SLOT, SLOT_BYTES, admit_slots, sample_rows
from .sequence import Sequence

_FINITE, _FORCED = 1, 2
_NUM_BUFFERS = 4  # pinned; one is filled while copies of those before may still run


class DeviceSampler:
    """Engine thread only. All work goes to torch's current stream."""

    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size  # the tokenizer's; ids from here on are padding of the embedding, never sampled
        self.max_num_seqs, self.device = max_num_seqs, torch.device(device)
        self.last_token = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)  # of each slot
        self.state = torch.zeros(max_num_seqs, SLOT_BYTES, dtype=torch.uint8, device=device)
        self._records = np.zeros(max_num_seqs, SLOT)
        self._staged: dict[int, None] = {}  # slots, in order
        self._arrived = torch.empty_like(self.state)
        self._buffers = [
            torch.empty(max_num_seqs, SLOT_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(_NUM_BUFFERS)
        ]
        self._copied = [torch.cuda.Event() for _ in range(_NUM_BUFFERS)]
        self._num_uploads = 0

    @staticmethod
    def needs_host(sequence: Sequence) -> bool:
        """The next token of this sequence is chosen by `sampler.py`."""
        budget = sequence.request.thinking
        too_long = budget is not None and len(budget.closing_ids) > MAX_CLOSING
        return too_long or sequence.grammar is not None or _looks_at_tokens(sequence)

    def admit(self, slot: int, sequence: Sequence) -> None:
        """From the next `upload` on the slot is this sequence's, at the point where the host knows it to be."""
        assert sequence.num_unseen == 0, "a step in flight draws for it: its state on the device is ahead"
        self._records[slot] = record_of(slot, sequence)
        self._staged[slot] = None

    def release(self, slot: int) -> None:
        """The slot's sequence has ended: what was staged for it need not be sent."""
        self._staged.pop(slot, None)

    def upload(self) -> None:
        """Send what was staged; before the step that samples it is launched or replayed, not while one is captured."""
        count = len(self._staged)
        if not count:
            return
        turn = self._num_uploads % _NUM_BUFFERS
        buffer, copied = self._buffers[turn], self._copied[turn]
        if self._num_uploads >= _NUM_BUFFERS:
            copied.synchronize()
        buffer.numpy().view(SLOT)[:count, 0] = self._records[list(self._staged)]
        self._arrived[:count].copy_(buffer[:count], non_blocking=True)
        copied.record()
        admit_slots(self._arrived[:count], self.state, self.last_token)
        self._num_uploads += 1
        self._staged.clear()

    def sample(self, logits: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [S, >= vocab_size] bf16 or float32, slots [S] int32 on the device, -1 = padding, no slot twice ->
        ids [S] int64, flags [S] uint8 (`decode_flags`), on the device."""
        return sample_rows(logits, self.vocab_size, slots, self.state, self.last_token)


def _looks_at_tokens(sequence: Sequence) -> bool:
    sampling = sequence.request.sampling
    return (
        sampling.num_logprobs >= 0
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
        or sampling.repetition_penalty != 1
        or (sequence.num_output_tokens < sampling.min_tokens and bool(sampling.stop_token_ids))
    )


def decode_flags(flags: np.ndarray) -> tuple[list[bool], list[bool]]:
    """[S] uint8 on the host -> finite, forced, as `Sampled` has them."""
    return (flags & _FINITE != 0).tolist(), (flags & _FORCED != 0).tolist()


def record_of(slot: int, sequence: Sequence) -> np.ndarray:
    """The state of a slot, [] SLOT."""
    record = np.zeros((), SLOT)
    sampling, thinking = sequence.request.sampling, sequence.thinking
    for name in ("temperature", "top_p", "min_p", "seed", "top_k"):
        record[name] = getattr(sampling, name)
    record["slot"], record["position"] = slot, sequence.num_output_tokens
    record["last_token"] = sequence.token_ids[sequence.num_tokens - 1]
    record["cursor"] = -1
    if thinking is not None:
        budget = thinking.budget
        record["has_thinking"] = 1
        record["think_id"], record["end_think_id"] = budget.think_id, budget.end_think_id
        record["budget"] = min(budget.budget_tokens, 2**31 - 1)
        record["inside"], record["num_spent"], record["cursor"] = thinking.inside, thinking.num_spent, thinking.cursor
        closing = budget.closing_ids[:MAX_CLOSING]  # a longer sentence needs the host
        record["num_closing"] = len(closing)
        record["closing"][: len(closing)] = closing
    return record
