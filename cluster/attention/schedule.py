"""Which piece of attention work a GPU does when: lengths in, index arrays out. Pure.

Short queries (decode, the rest of a prompt) are **items** (request, query tile, KV chunk): `tile_q` rows of one KV
head's group against one chunk of KV. A long context is cut into chunks so that a small batch fills the GPU; a second
kernel adds the chunks up, which costs a launch, so they are cut only where that pays. Long queries are **works**
(query tile of 128 tokens, head) dealt to persistent CTAs, longest first and back and forth, so that all end together.
With a fixed chunk and one tile size a token's sums are the same whatever it is computed with. Ideas: split-KV of
flash-decoding (Dao et al.), FlashInfer's plan (its kernels read these arrays), longest-processing-time scheduling."""

from dataclasses import dataclass

import numpy as np

LONG_TILE = 128  # query tokens of one work of the kernel for long queries
# In tokens of KV that one CTA reads alone, 12 ns each on an H100:
MERGE_COST = 250  # a second launch
ROW_COST = 1  # a query row's partial results, written and read, for all heads
SATURATING_CTAS = 70  # as many CTAs read as fast as memory does
_CHUNKS = np.array([128, *(128 * c << p for p in range(11) for c in (2, 3))], np.int64)  # 128, 256, 384, 512, ...
SINGLE = 1 << 30  # a chunk that holds any sequence
# In tokens of KV that a CTA of the kernel for long queries reads, 15 ns each on an H100:
SHORT_COST = 2.1  # what the kernel for short queries takes for the same products on a full GPU, uneven ends included
CUT_COST = 550  # its second launch and the partial results


@dataclass(frozen=True, slots=True)
class Items:
    """One launch over short queries. Rows of requests without items are left as they are."""

    tile_q: int
    chunk: int  # tokens of KV; SINGLE: nothing is cut, and no second kernel follows
    request: np.ndarray  # [num_items] int32
    q_tile: np.ndarray  # [num_items] int32
    kv_chunk: np.ndarray  # [num_items] int32
    num_chunks: np.ndarray  # [R] int64, 0 for a request without items

    @property
    def cut(self) -> bool:
        return self.chunk != SINGLE

    @property
    def num_items(self) -> int:
        return len(self.request)


@dataclass(frozen=True, slots=True)
class Works:
    """One launch over long queries: `starts` [num_ctas + 1] into the other arrays, [num_works] int32."""

    starts: np.ndarray
    request: np.ndarray
    head: np.ndarray
    q_tile: np.ndarray
    longest: int  # tokens of KV that the CTA with the most to do reads

    def pay(self, q_lens: np.ndarray, seq_lens: np.ndarray, chosen: np.ndarray, *, num_heads: int) -> bool:
        """Whether the kernel for long queries takes less time than the one for short ones. It is twice as fast, but
        reads a context from end to end: few tokens far into one keep a part of the GPU busy for long, and the other one
        cuts contexts in chunks."""
        tokens = np.where(chosen, q_lens, 0).astype(np.int64)
        reads = int(tokens @ (seq_lens - q_lens // 2)) * num_heads / LONG_TILE / (len(self.starts) - 1)
        return self.longest <= SHORT_COST * reads + CUT_COST


def tile_for(q_len: int, group_size: int) -> int:
    """The query tile for queries of up to `q_len` tokens, packed by the heads of a group."""
    packed = q_len * group_size
    return 16 if packed <= 16 else 64 if packed <= 256 else 128


def choose_chunk(
    seq_lens: np.ndarray,
    num_tiles: np.ndarray,
    *,
    slots: int,
    kv_heads: int,
    most_items: int,
    num_rows: int | None = None,
) -> int:
    """The chunk with the least expected time for `num_tiles` query tiles of each request on `slots` items at once;
    SINGLE where cutting does not pay. No more than `most_items` items come of it."""
    tiles = num_tiles.astype(np.int64)
    lens = np.where(tiles > 0, seq_lens, 0).astype(np.int64)
    longest, total = int(lens.max(initial=0)), int(lens @ tiles)
    floor = total * kv_heads / SATURATING_CTAS
    merge = MERGE_COST + ROW_COST * (len(lens) if num_rows is None else num_rows)
    if longest <= max(floor, _CHUNKS[0]) + merge:
        return SINGLE
    candidates = np.append(_CHUNKS[longest > _CHUNKS], longest)  # the last one cuts nothing
    whole, rest = np.divmod(lens[:, None], candidates)  # [R, candidates]
    num_whole, num_rest, sum_rest = tiles @ whole, tiles @ (rest > 0), tiles @ rest
    # The whole chunks go first, slot by slot; rests fill what their last round leaves free, others a round of theirs.
    rounds, last = np.divmod(num_whole, slots)
    mean_rest = sum_rest / np.maximum(num_rest, 1)
    filled = np.where(last > 0, (slots - last) * (candidates // np.maximum(mean_rest, 1)), 0)
    more = -(-np.maximum(num_rest - filled, 0) // slots)
    alone = (rounds + (last > 0)) * candidates + more * mean_rest
    cost = np.cbrt(alone**3 + floor**3) + (num_whole + num_rest) / 4  # near both limits a bit more than either
    cost[:-1] += merge
    cost[:-1][(num_whole + num_rest)[:-1] > most_items] = np.inf
    best = int(np.argmin(cost))
    return int(candidates[best]) if best < len(candidates) - 1 else SINGLE


def aligned(q_lens: np.ndarray, seq_lens: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Requests whose first query is not at a multiple of `tokens` become two: up to the next multiple, and the rest. So
    no tile of queries lies across one. -> q_lens, seq_lens, and which request each is of."""
    first = seq_lens - q_lens
    ahead = -first % tokens
    twice = (ahead > 0) & (ahead < q_lens)
    request = np.repeat(np.arange(len(q_lens)), 1 + twice)
    is_ahead = np.append(request[1:] == request[:-1], False)
    is_rest = np.append(False, is_ahead[:-1])
    lens = np.where(is_ahead, ahead[request], q_lens[request] - np.where(is_rest, ahead[request], 0))
    return lens, np.where(is_ahead, first[request] + ahead[request], seq_lens[request]), request


def make_items(
    q_lens: np.ndarray,
    seq_lens: np.ndarray,
    *,
    group_size: int,
    tile_q: int,
    chunk: int,
    chosen: np.ndarray | None = None,
) -> Items:
    """Items of the `chosen` requests (mask [R], None = all), those that read most KV first."""
    num_tiles = -(-q_lens.astype(np.int64) * group_size // tile_q)
    if chosen is not None:
        num_tiles = np.where(chosen, num_tiles, 0)
    num_chunks = np.where(num_tiles > 0, np.maximum(1, -(-seq_lens.astype(np.int64) // chunk)), 0)
    count = num_tiles * num_chunks
    request = np.repeat(np.arange(len(q_lens)), count)
    within = np.arange(len(request)) - np.repeat(np.cumsum(count) - count, count)
    q_tile, kv_chunk = np.divmod(within, num_chunks[request])
    first_position = (seq_lens.astype(np.int64) - q_lens)[request]
    seen = np.minimum(seq_lens[request], first_position + -(-((q_tile + 1) * tile_q) // group_size))
    order = np.argsort(-np.clip(seen - kv_chunk * chunk, 0, chunk), kind="stable")
    sorted_items = [a[order].astype(np.int32) for a in (request, q_tile, kv_chunk)]
    return Items(tile_q, chunk, sorted_items[0], sorted_items[1], sorted_items[2], num_chunks)


def make_works(q_lens: np.ndarray, seq_lens: np.ndarray, chosen: np.ndarray, *, num_heads: int, num_ctas: int) -> Works:
    """Works of the `chosen` requests, dealt to the CTAs."""
    num_tiles = np.where(chosen, -(-q_lens.astype(np.int64) // LONG_TILE), 0)
    request = np.repeat(np.arange(len(q_lens)), num_tiles)
    q_tile = np.arange(len(request)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
    first_position = (seq_lens.astype(np.int64) - q_lens)[request]
    seen = np.minimum(seq_lens[request], first_position + (q_tile + 1) * LONG_TILE)
    order = np.argsort(-seen, kind="stable")
    request, q_tile = (np.repeat(a[order], num_heads) for a in (request, q_tile))  # the heads of a tile in a row
    head = np.tile(np.arange(num_heads), len(order))
    rounds, cta = np.divmod(np.arange(len(request)), num_ctas)
    cta = np.where(rounds % 2, num_ctas - 1 - cta, cta)
    dealt = np.argsort(cta, kind="stable")  # keeps each CTA's rounds in order
    starts = np.zeros(num_ctas + 1, dtype=np.int32)
    np.cumsum(np.bincount(cta, minlength=num_ctas), out=starts[1:])
    longest = int(np.bincount(cta, weights=np.repeat(seen[order], num_heads), minlength=num_ctas).max())
    dealt_works = [a[dealt].astype(np.int32) for a in (request, head, q_tile)]
    return Works(starts, dealt_works[0], dealt_works[1], dealt_works[2], longest)
