"""Logits -> the next token of each row: penalties, grammar, greedy or drawn, forced tokens, log probabilities.

Each row is decided from its own logits, parameters and tokens alone, whatever the batch. Order of the rules, that of
transformers: penalties, the answer's grammar, temperature, top-k, top-p over what is left, min-p, draw (`draw.py`)."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from ...request import SamplingParams, TokenLogprob
from .draw import draw, largest, rows_of, sum_exp
from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class Sampled:
    """One entry a row. A row whose logits hold no finite maximum has `finite` False and a meaningless token."""

    token_ids: list[int]
    forced: list[bool]  # set by the thinking budget, not by the model
    finite: list[bool]
    logprobs: list[TokenLogprob | None]


class Sampler:
    """Stateless: what a row needs lies in its `Sequence`."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size  # the tokenizer's; ids from here on are padding of the embedding, never sampled

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> Sampled:
        """`logits` [S, >= vocab_size] float32, row i belongs to `sequences[i]`; they are spent (changed in place).

        Log probabilities are those of the model's own distribution over the tokenizer's vocabulary: before penalties,
        temperature and truncation, whatever was drawn."""
        logits = logits[:, : self.vocab_size]
        simple = all(s.grammar is None and is_simple(s.request.sampling) for s in sequences)
        wanted = [] if simple else [i for i, s in enumerate(sequences) if s.request.sampling.num_logprobs >= 0]
        unmodified = logits[wanted] if wanted else None
        if not simple:
            for row, sequence in enumerate(sequences):
                _penalize(logits, row, sequence)
                _constrain(logits, row, sequence)
        ids, maxima = _argmax(logits)
        finite = np.isfinite(maxima)
        if not simple:
            drawn = [i for i, s in enumerate(sequences) if s.request.sampling.temperature > 0 and finite[i]]
            if drawn:
                ids[drawn] = draw(rows_of(logits, drawn), [sequences[i] for i in drawn])
        token_ids = ids.tolist()
        forced = [False] * len(sequences)
        for row, sequence in enumerate(sequences):
            if sequence.thinking is not None and (forced_id := sequence.thinking.forced_id) is not None:
                token_ids[row], forced[row] = forced_id, True
        logprobs: list[TokenLogprob | None] = [None] * len(sequences)
        if unmodified is not None:
            counts = [sequences[i].request.sampling.num_logprobs for i in wanted]
            for row, logprob in zip(wanted, _logprobs(unmodified, [token_ids[i] for i in wanted], counts)):
                logprobs[row] = logprob
        return Sampled(token_ids, forced, finite.tolist(), logprobs)


def is_simple(sampling: SamplingParams) -> bool:
    """Greedy without anything that looks at or changes the distribution: the arg max is the whole story."""
    return (
        sampling.temperature == 0
        and sampling.num_logprobs < 0
        and sampling.min_tokens == 0
        and sampling.presence_penalty == 0
        and sampling.frequency_penalty == 0
        and sampling.repetition_penalty == 1
    )


def _argmax(logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """First id of the largest logit of each row, and that logit; NaN counts as largest."""
    if logits.device.type == "cpu":  # numpy's is 7 times faster than torch's here
        array = logits.numpy()
        ids = array.argmax(axis=1)
        return ids, array[np.arange(len(ids)), ids]
    best = logits.argmax(dim=1, keepdim=True)
    return best[:, 0].cpu().numpy(), logits.gather(1, best)[:, 0].cpu().numpy()


def _penalize(logits: torch.Tensor, row: int, sequence: Sequence) -> None:
    """Repetition penalty over prompt and output, presence and frequency over the output, stop ids before min_tokens."""
    sampling = sequence.request.sampling
    if sampling.repetition_penalty != 1:
        seen = torch.from_numpy(np.unique(sequence.token_ids[: sequence.num_tokens])).to(logits.device)
        values = logits[row, seen]
        penalty = sampling.repetition_penalty
        logits[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
    if (sampling.presence_penalty or sampling.frequency_penalty) and sequence.num_output_tokens:
        ids, counts = np.unique(sequence.output_ids, return_counts=True)
        penalties = sampling.presence_penalty + sampling.frequency_penalty * counts
        where = torch.from_numpy(ids).to(logits.device)
        logits[row, where] -= torch.from_numpy(penalties.astype(np.float32)).to(logits.device)
    if sequence.num_output_tokens < sampling.min_tokens:
        stops = [i for i in sampling.stop_token_ids if i < logits.shape[1]]
        logits[row, torch.tensor(stops, dtype=torch.int64, device=logits.device)] = -torch.inf


def _constrain(logits: torch.Tensor, row: int, sequence: Sequence) -> None:
    """Only what the answer's grammar allows; a token that the thinking budget forces is not asked about."""
    if sequence.grammar is None or (sequence.thinking is not None and sequence.thinking.forced_id is not None):
        return
    mask = sequence.grammar.mask()
    if mask is not None:
        logits[row].masked_fill_(torch.from_numpy(banned(mask, logits.shape[1])).to(logits.device), -torch.inf)


def banned(mask: np.ndarray, vocab_size: int) -> np.ndarray:
    """[words] int32 of allowed ids -> [vocab_size] bool, True where an id may not come."""
    return np.unpackbits((~mask).view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)


def _logprobs(logits: torch.Tensor, token_ids: list[int], counts: list[int]) -> list[TokenLogprob]:
    """Of the chosen token and of the `counts[i]` most likely ones, for unmodified logits [S, V]."""
    maxima = logits.amax(1, keepdim=True).double()
    ones = torch.ones(len(token_ids), dtype=torch.float64, device=logits.device)
    log_total = maxima[:, 0] + sum_exp(logits, maxima, ones).log()
    chosen = logits.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].double() - log_total
    values, ids = largest(logits, min(max(1, *counts), logits.shape[1]))
    top_logprobs, top_ids = (values.double() - log_total[:, None]).tolist(), ids.tolist()
    return [
        TokenLogprob(token_id, logprob, tuple(zip(row_ids[:count], row_logprobs[:count])))
        for token_id, logprob, row_ids, row_logprobs, count in zip(
            token_ids, chosen.tolist(), top_ids, top_logprobs, counts
        )
    ]
