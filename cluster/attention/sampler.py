"""Logits -> the next token of each row: penalties, greedy or drawn, forced tokens, log probabilities.

Why counter-based: the only randomness is one uniform per row, Philox4x32-10 keyed by the request's seed and counted by
the output position. The same seed and position give the same draw in any batch, after preemption and in a step run
twice. Everything that decides a row is computed from that row alone: candidates are ordered by (-logit, id), so ties go
to the lowest id, and sums run along that order in float64.
Order of the rules, that of transformers: penalties, temperature, top-k, top-p over what is left, min-p, draw.
Idea: Random123 (Salmon et al., 2011) for the draw; inverse CDF for the choice."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from ...request import SamplingParams, TokenLogprob
from .sequence import Sequence

_NUM_CANDIDATES = 256  # first try for top-p or min-p without top-k; rows that need more are sorted whole
_CDF_BLOCK = 64  # an untruncated row is searched in two levels, blocks of so many ids


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
        simple = all(is_simple(s.request.sampling) for s in sequences)
        wanted = [] if simple else [i for i, s in enumerate(sequences) if s.request.sampling.num_logprobs >= 0]
        unmodified = logits[wanted] if wanted else None
        if not simple:
            for row, sequence in enumerate(sequences):
                _penalize(logits, row, sequence)
        ids, maxima = _argmax(logits)
        finite = np.isfinite(maxima)
        if not simple:
            drawn = [i for i, s in enumerate(sequences) if s.request.sampling.temperature > 0 and finite[i]]
            if drawn:
                ids[drawn] = _draw(logits[drawn], [sequences[i] for i in drawn])
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


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[S] uint64, [S] uint64 -> [S] float64 in [0, 1), 53 bits, a function of (seed, position) alone."""
    words = philox4x32(seeds, positions)
    high, low = words[0] >> np.uint64(5), words[1] >> np.uint64(6)
    return (high * 67108864.0 + low) / 9007199254740992.0


def philox4x32(key: np.ndarray, counter: np.ndarray) -> list[np.ndarray]:
    """Philox4x32-10: 64-bit keys and counters (the counter's upper half is 0) -> four words of 32 bits in uint64."""
    mask, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    key0, key1 = key & mask, key >> shift
    c0, c1 = counter & mask, counter >> shift
    c2, c3 = np.zeros_like(c0), np.zeros_like(c0)
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ key0,
            product1 & mask,
            (product0 >> shift) ^ c3 ^ key1,
            product0 & mask,
        )
        key0, key1 = (key0 + np.uint64(0x9E3779B9)) & mask, (key1 + np.uint64(0xBB67AE85)) & mask
    return [c0, c1, c2, c3]


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


def _draw(logits: torch.Tensor, sequences: list[Sequence]) -> np.ndarray:
    """Rows with temperature > 0, logits [S, V] -> [S] ids."""
    sampling = [s.request.sampling for s in sequences]
    device, size = logits.device, len(sampling)
    temperature = torch.tensor([p.temperature for p in sampling], dtype=torch.float64, device=device)
    top_k = torch.tensor([p.top_k for p in sampling], device=device)
    top_p = torch.tensor([p.top_p for p in sampling], dtype=torch.float64, device=device)
    min_p = torch.tensor([p.min_p for p in sampling], dtype=torch.float64, device=device)
    seeds = np.fromiter((p.seed for p in sampling), np.uint64, size)
    positions = np.fromiter((s.num_output_tokens for s in sequences), np.uint64, size)
    uniform = torch.from_numpy(uniforms(seeds, positions)).to(device)

    truncated = (top_k > 0) | (top_p < 1) | (min_p > 0)
    ids = torch.empty(size, dtype=torch.int64, device=device)
    rows = truncated.nonzero()[:, 0]
    if len(rows):
        widest = int(torch.where(top_k > 0, top_k, _NUM_CANDIDATES)[rows].max())
        chosen, done = _draw_truncated(
            logits[rows], temperature[rows], top_k[rows], top_p[rows], min_p[rows], uniform[rows], widest
        )
        ids[rows] = chosen
        rows = rows[~done]
        if len(rows):
            ids[rows], _ = _draw_truncated(
                logits[rows],
                temperature[rows],
                top_k[rows],
                top_p[rows],
                min_p[rows],
                uniform[rows],
                logits.shape[1],
            )
    rows = (~truncated).nonzero()[:, 0]
    if len(rows):
        ids[rows] = _draw_untruncated(logits[rows], temperature[rows], uniform[rows])
    return ids.cpu().numpy()


def _draw_truncated(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
    num_candidates: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> ([S] ids, [S] bool: the candidates held all that top-p and min-p keep; else try again with more)."""
    vocab_size = logits.shape[1]
    num_candidates = min(num_candidates, vocab_size)
    values, ids = _largest(logits, num_candidates)  # [S, C] each, by (-logit, id)
    maxima = values[:, :1].double()
    weights = torch.exp((values.double() - maxima) / temperature[:, None])  # [S, C]; the first is 1
    limit = torch.where(top_k > 0, top_k, vocab_size)[:, None]
    columns = torch.arange(num_candidates, device=logits.device)
    weights = torch.where(columns < limit, weights, 0.0)
    cumulative = weights.cumsum(1)
    before = torch.nn.functional.pad(cumulative[:, :-1], (1, 0))
    total = cumulative[:, -1].clone()
    whole = (top_k == 0) & (top_p < 1)
    if whole.any():
        total[whole] = _sum_exp(logits[whole], maxima[whole], temperature[whole])
    mass = (top_p * total)[:, None]
    keep = (before < mass) & (weights >= min_p[:, None]) & (weights > 0)
    done = (limit[:, 0] <= num_candidates) | ~keep[:, -1]
    cdf = torch.where(keep, weights, 0.0).cumsum(1)
    column = (cdf <= uniform[:, None] * cdf[:, -1:]).sum(1)
    column = torch.minimum(column, keep.sum(1) - 1)
    return ids.gather(1, column[:, None])[:, 0], done


def _draw_untruncated(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse CDF over all ids in their order, in two levels: blocks of ids, then inside one block."""
    rows, vocab_size = logits.shape
    num_blocks = -(-vocab_size // _CDF_BLOCK)
    weights = logits.new_zeros(rows, num_blocks * _CDF_BLOCK)
    scaled = (logits - logits.amax(1, keepdim=True)) / temperature[:, None].float()
    torch.exp(scaled, out=scaled)
    weights[:, :vocab_size] = scaled
    weights = weights.view(rows, num_blocks, _CDF_BLOCK)
    cdf = weights.sum(2, dtype=torch.float64).cumsum(1)  # [S, num_blocks]
    target = uniform[:, None] * cdf[:, -1:]
    block = torch.searchsorted(cdf, target, right=True).clamp_(max=num_blocks - 1)  # [S, 1]
    before = torch.nn.functional.pad(cdf, (1, 0)).gather(1, block)
    inside = weights.gather(1, block[:, :, None].expand(-1, -1, _CDF_BLOCK))[:, 0].double()  # [S, _CDF_BLOCK]
    offset = (inside.cumsum(1) + before <= target).sum(1, keepdim=True)
    positive = inside > 0
    last = _CDF_BLOCK - 1 - positive.flip(1).to(torch.int8).argmax(1, keepdim=True)
    return (block * _CDF_BLOCK + torch.minimum(offset, last))[:, 0]


def _sum_exp(logits: torch.Tensor, maxima: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """[S, V], [S, 1], [S] -> [S] float64, sum of exp((logit - max) / temperature) over the row."""
    return torch.exp((logits - maxima.float()) / temperature[:, None].float()).sum(1, dtype=torch.float64)


def _largest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of each row in the order (-logit, id): ([S, count] values, [S, count] ids).

    topk leaves open which of equal values it takes, so a row with a tie across the border is sorted whole."""
    if 4 * count >= logits.shape[1]:
        values, ids = logits.sort(dim=1, descending=True, stable=True)
        return values[:, :count], ids[:, :count]
    values, ids = logits.topk(count + 1, dim=1)
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)
    tied = values[:, count - 1] == values[:, count]
    values, ids = values[:, :count], ids[:, :count]
    if tied.any():
        sorted_values, sorted_ids = logits[tied].sort(dim=1, descending=True, stable=True)
        values[tied], ids[tied] = sorted_values[:, :count], sorted_ids[:, :count]
    return values, ids


def _logprobs(logits: torch.Tensor, token_ids: list[int], counts: list[int]) -> list[TokenLogprob]:
    """Of the chosen token and of the `counts[i]` most likely ones, for unmodified logits [S, V]."""
    maxima = logits.amax(1, keepdim=True).double()
    ones = torch.ones(len(token_ids), dtype=torch.float64, device=logits.device)
    log_total = maxima[:, 0] + _sum_exp(logits, maxima, ones).log()
    chosen = logits.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].double() - log_total
    values, ids = _largest(logits, min(max(1, *counts), logits.shape[1]))
    top_logprobs, top_ids = (values.double() - log_total[:, None]).tolist(), ids.tolist()
    return [
        TokenLogprob(token_id, logprob, tuple(zip(row_ids[:count], row_logprobs[:count])))
        for token_id, logprob, row_ids, row_logprobs, count in zip(
            token_ids, chosen.tolist(), top_ids, top_logprobs, counts
        )
    ]
