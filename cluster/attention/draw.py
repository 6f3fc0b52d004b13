"""One uniform a row -> the chosen id: inverse CDF over what temperature, top-k, top-p and min-p leave.

Why counter-based: the only randomness is Philox4x32-10 keyed by the request's seed and counted by the output position,
so the same seed and position give the same draw in any batch, after preemption, and in a step run twice. Whatever
decides a row is computed from that row alone, the way it takes included: among few candidates the CDF runs in the order
(-logit, id); a row that keeps more than `_NUM_CANDIDATES` without top-k, or everything, is drawn in the order of ids,
which needs no sorted ids. Ties go to the lowest id.
Idea: Random123 (Salmon et al., 2011)."""

from dataclasses import dataclass

import numpy as np
import torch

from .sequence import Sequence

_NUM_CANDIDATES = 256  # what top-p and min-p without top-k usually keep less of
_TOP_BLOCK = 128  # the largest of a large vocabulary are looked for in blocks of so many ids
_CDF_BLOCK = 64  # the CDF in the order of ids has two levels, blocks of so many ids


@dataclass(frozen=True, slots=True)
class _Rules:
    """[S] each."""

    temperature: torch.Tensor  # float64, > 0
    top_k: torch.Tensor  # int64, 0 = off
    top_p: torch.Tensor  # float64
    min_p: torch.Tensor  # float64
    uniform: torch.Tensor  # float64 in [0, 1)

    @classmethod
    def of(cls, sequences: list[Sequence], device: torch.device) -> "_Rules":
        sampling, size = [s.request.sampling for s in sequences], len(sequences)
        seeds = np.fromiter((p.seed for p in sampling), np.uint64, size)
        positions = np.fromiter((s.num_output_tokens for s in sequences), np.uint64, size)
        return cls(
            temperature=torch.tensor([p.temperature for p in sampling], dtype=torch.float64, device=device),
            top_k=torch.tensor([p.top_k for p in sampling], device=device),
            top_p=torch.tensor([p.top_p for p in sampling], dtype=torch.float64, device=device),
            min_p=torch.tensor([p.min_p for p in sampling], dtype=torch.float64, device=device),
            uniform=torch.from_numpy(uniforms(seeds, positions)).to(device),
        )

    def __getitem__(self, rows: list[int]) -> "_Rules":
        return _Rules(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows], self.uniform[rows])


def draw(logits: torch.Tensor, sequences: list[Sequence]) -> np.ndarray:
    """logits [S, V] float32 of rows with temperature > 0 and a finite maximum -> [S] ids."""
    rules = _Rules.of(sequences, logits.device)
    truncated = (rules.top_k > 0) | (rules.top_p < 1) | (rules.min_p > 0)
    ids = torch.empty(len(sequences), dtype=torch.int64, device=logits.device)
    rows = truncated.nonzero()[:, 0].tolist()
    if rows:
        ids[rows], done = _draw_among_few(rows_of(logits, rows), rules[rows])
        rows = [row for row, is_done in zip(rows, done.tolist()) if not is_done]
    if rows:
        ids[rows] = _draw_among_many(logits[rows], rules[rows])
    rows = (~truncated).nonzero()[:, 0].tolist()
    if rows:
        ids[rows] = _draw_among_all(rows_of(logits, rows), rules[rows])
    return ids.cpu().numpy()


def rows_of(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """logits[rows] for ascending rows, without a copy where that is all of them."""
    return logits if len(rows) == logits.shape[0] else logits[rows]


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


def _draw_among_few(logits: torch.Tensor, rules: _Rules) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k, or at most _NUM_CANDIDATES -> ([S] ids, [S] bool: False where top-p and min-p keep more than these)."""
    vocab_size = logits.shape[1]
    limit = torch.where(rules.top_k > 0, rules.top_k, _NUM_CANDIDATES).clamp(max=vocab_size)[:, None]
    values, ids = largest(logits, int(limit.max()))  # [S, C] each, by (-logit, id)
    columns = torch.arange(values.shape[1], device=logits.device)
    maxima = values[:, :1].double()
    weights = torch.exp((values.double() - maxima) / rules.temperature[:, None])  # the first is 1
    weights = torch.where(columns < limit, weights, 0.0)
    cumulative = weights.cumsum(1)
    total = cumulative[:, -1].clone()
    whole = (rules.top_k == 0) & (rules.top_p < 1)
    if whole.any():
        rows = whole.nonzero()[:, 0].tolist()
        total[rows] = sum_exp(rows_of(logits, rows), maxima[rows], rules.temperature[rows])
    keep = _kept(weights, cumulative, total, rules)
    cdf = torch.where(keep, weights, 0.0).cumsum(1)
    column = (cdf <= rules.uniform[:, None] * cdf[:, -1:]).sum(1)
    num_kept = keep.sum(1)
    column = torch.minimum(column, num_kept - 1)
    done = (rules.top_k > 0) | (num_kept < limit[:, 0]) | (limit[:, 0] == vocab_size)
    return ids.gather(1, column[:, None])[:, 0], done


def _draw_among_many(logits: torch.Tensor, rules: _Rules) -> torch.Tensor:
    """Top-p and min-p that keep many: find the smallest logit kept, then draw among the kept in the order of ids."""
    values = _sorted(logits)
    weights = torch.exp((values - values[:, :1]) / rules.temperature[:, None].float())
    cumulative = weights.cumsum(1, dtype=torch.float64)
    num_kept = _kept(weights, cumulative, cumulative[:, -1], rules).sum(1, keepdim=True)
    threshold = values.gather(1, num_kept - 1)
    kept = logits >= threshold
    num_over = kept.sum(1, keepdim=True) - num_kept  # of those equal to the threshold, the highest ids go
    rows = (num_over[:, 0] > 0).nonzero()[:, 0].tolist()
    if rows:
        tied = logits[rows] == threshold[rows]
        last_kept = tied.sum(1, keepdim=True) - num_over[rows]
        kept[rows] &= ~tied | (tied.cumsum(1) <= last_kept)
    return _draw_among_all(torch.where(kept, logits, -torch.inf), rules)


def _kept(weights: torch.Tensor, cumulative: torch.Tensor, total: torch.Tensor, rules: _Rules) -> torch.Tensor:
    """Of weights in falling order, the prefix that top-p (the one that crosses it included) and min-p keep."""
    before = torch.nn.functional.pad(cumulative[:, :-1], (1, 0))
    mass = torch.where(rules.top_p < 1, rules.top_p * total, torch.inf)[:, None]
    return (before < mass) & (weights >= rules.min_p[:, None]) & (weights > 0)


def _draw_among_all(logits: torch.Tensor, rules: _Rules) -> torch.Tensor:
    """Inverse CDF over all ids in their order, -inf = none, in two levels: blocks of ids, then inside one block."""
    rows, vocab_size = logits.shape
    num_blocks = -(-vocab_size // _CDF_BLOCK)
    weights = logits.new_zeros(rows, num_blocks * _CDF_BLOCK)
    scaled = (logits - logits.amax(1, keepdim=True)) / rules.temperature[:, None].float()
    torch.exp(scaled, out=scaled)
    weights[:, :vocab_size] = scaled
    weights = weights.view(rows, num_blocks, _CDF_BLOCK)
    cdf = weights.sum(2, dtype=torch.float64).cumsum(1)  # [S, num_blocks]
    target = rules.uniform[:, None] * cdf[:, -1:]
    block = torch.searchsorted(cdf, target, right=True).clamp_(max=num_blocks - 1)  # [S, 1]
    before = torch.nn.functional.pad(cdf, (1, 0)).gather(1, block)
    inside = weights.gather(1, block[:, :, None].expand(-1, -1, _CDF_BLOCK))[:, 0].double()  # [S, _CDF_BLOCK]
    offset = (inside.cumsum(1) + before <= target).sum(1, keepdim=True)
    positive = inside > 0
    last = _CDF_BLOCK - 1 - positive.flip(1).to(torch.int8).argmax(1, keepdim=True)
    return (block * _CDF_BLOCK + torch.minimum(offset, last))[:, 0]


def sum_exp(logits: torch.Tensor, maxima: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """[S, V], [S, 1], [S] -> [S] float64, sum of exp((logit - max) / temperature) over the row."""
    return torch.exp((logits - maxima.float()) / temperature[:, None].float()).sum(1, dtype=torch.float64)


def largest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of each row in the order (-logit, id): ([S, count] values, [S, count] ids).

    topk leaves open which of equal values it takes, so a row with a tie across the border is sorted whole. In a large
    vocabulary only the `count` blocks of ids with the largest maxima are looked into: by the same order of blocks, an
    element of another block has at least `count` elements before it."""
    if 4 * count * _TOP_BLOCK < logits.shape[1]:
        ids = _ids_of_best_blocks(logits, count)  # [S, count * _TOP_BLOCK], ascending
        values = logits.gather(1, ids.clamp(max=logits.shape[1] - 1))
        values[ids >= logits.shape[1]] = -torch.inf
        values, columns = _largest_of_few(values, count)
        return values, ids.gather(1, columns)
    return _largest_of_few(logits, count)


def _ids_of_best_blocks(logits: torch.Tensor, count: int) -> torch.Tensor:
    num_whole = logits.shape[1] // _TOP_BLOCK
    whole = logits[:, : num_whole * _TOP_BLOCK].view(-1, num_whole, _TOP_BLOCK).amax(2)
    rest = logits[:, num_whole * _TOP_BLOCK :]
    maxima = torch.cat([whole, rest.amax(1, keepdim=True)], 1) if rest.shape[1] else whole
    blocks = _largest_of_few(maxima, count)[1].sort(dim=1).values
    return (blocks[:, :, None] * _TOP_BLOCK + torch.arange(_TOP_BLOCK, device=logits.device)).flatten(1)


def _largest_of_few(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    if 4 * count >= logits.shape[1]:
        values, ids = logits.sort(dim=1, descending=True, stable=True)
        return values[:, :count], ids[:, :count]
    values, ids = logits.topk(count + 1, dim=1)
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)
    tied = (values[:, count - 1] == values[:, count]) & (values[:, count] > -torch.inf)  # masked ids are all the same
    values, ids = values[:, :count], ids[:, :count]
    if tied.any():
        sorted_values, sorted_ids = logits[tied].sort(dim=1, descending=True, stable=True)
        values[tied], ids[tied] = sorted_values[:, :count], sorted_ids[:, :count]
    return values, ids


def _sorted(logits: torch.Tensor) -> torch.Tensor:
    """Each row in falling order."""
    if logits.device.type == "cpu":  # numpy's vectorised sort is 20 times faster than torch's here
        return torch.from_numpy(-np.sort(-logits.numpy(), axis=1))
    return logits.sort(dim=1, descending=True).values
