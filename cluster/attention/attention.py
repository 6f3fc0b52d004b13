"""Attention over paged KV whose result for a token depends on that token's own sequence alone.

KV positions are taken in **tiles** of `TILE` positions, aligned to position 0 of the sequence. For a group of query
rows, scores are one product per tile ([rows, head_dim] x [head_dim, TILE]), the maximum over all tiles is exact,
and the two sums (weights; weights x values, [rows, TILE] x [TILE, head_dim]) are made per tile and then added over
tiles by a binary tree whose leaves are tile numbers. So K and N of every product are constants, the order of every
sum is fixed by position, and padding adds exact zeros. By what `numerics.py` tests (a product's row does not depend
on the other rows, given at least `min_rows` of them) a token's bits are the same whether it is computed alone in
decode, in a mixed batch or inside a prefill chunk of any size, and whatever the padded length of its bucket.

Vectorised over requests: a step's queries become **items** (consecutive new tokens of one request; a decode is an
item of one), and items of like size form a **bucket** that shares one gather and one pair of batched products.
Without the invariant mode the same buckets go through torch's scaled_dot_product_attention. Idea: two-pass
flash-decoding, with FlashAttention's tiles aligned to the sequence instead of to the launch."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from ...kernels.kv_numbers import as_moved, from_kv, to_kv
from ...model_config import ModelConfig
from ...numerics import Numerics
from .batch import StepBatch

TILE = 64  # KV positions of one product
QUERY_ROWS = 64  # most query tokens of one item
_FAR = 1e30  # taken from the score of a hidden position, so that it is never the maximum
_LEAST = -60.0  # a score further below the maximum weighs 9e-27; exp of less is many times slower, and as good as zero
_MAX_SCORES = 8 << 20  # scores of one item at most, so that a long context does not need long buffers
_MAX_GATHER = 4 << 20  # elements of K gathered for one bucket, unless a single item needs more


class Heads(Protocol):
    """What attention needs of a model's configuration."""

    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Bucket:
    """`I` items of `Q` query rows (padded) over `num_tiles` KV tiles (padded)."""

    num_items: int
    num_queries: int
    num_tiles: int
    token_rows: torch.Tensor  # [I * Q] int64 rows of T; padding repeats the item's last row
    kv_rows: torch.Tensor  # [I * num_kv_heads * L] int64 rows of the cache seen as [num_slots * num_kv_heads, head_dim]
    hidden: torch.Tensor  # [I, num_tiles, Q, TILE] bool, True = later than the query, or beyond the sequence
    first_partial_tile: int  # tiles before it are visible to every query of the bucket
    visible: torch.Tensor  # [I, 1, num_tiles - first_partial_tile, Q, 1, TILE] float32, 1 or 0: `hidden` as a factor
    distance: torch.Tensor  # the same shape, 0 or -_FAR: `hidden` as an addend


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What all layers of one step share."""

    buckets: tuple[Bucket, ...]
    written_rows: torch.Tensor | None  # rows of T to write to KV; None = all
    written_slots: torch.Tensor
    whole: bool  # one bucket that holds every token once, in order: plain decode


class PagedAttention:
    """Writes K and V of a step's tokens into the pages and attends to them. Holds no state between steps."""

    def __init__(self, config: Heads, numerics: Numerics, *, block_size: int) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.group_size = config.num_heads // config.num_kv_heads
        self.numerics, self.block_size = numerics, block_size
        self.scale = config.head_dim**-0.5

    @staticmethod
    def product_shapes(config: ModelConfig) -> list[tuple[int, int]]:
        """(K, N) of the batched products, for the self-test."""
        return [(config.head_dim, TILE), (TILE, config.head_dim)]

    def plan(self, batch: StepBatch) -> AttentionPlan:
        device = batch.token_ids.device
        table = batch.block_table.cpu().numpy().astype(np.int64)
        made = [
            self._make_bucket(items, num_queries, num_tiles, table, device)
            for (num_queries, num_tiles), items in self._items(batch).items()
        ]
        buckets = tuple(bucket for group in made for bucket in group)
        written = batch.slot_mapping >= 0
        rows = None if bool(written.all()) else written.nonzero().squeeze(1)
        slots = batch.slot_mapping if rows is None else batch.slot_mapping[rows]
        whole = len(buckets) == 1 and buckets[0].num_items * buckets[0].num_queries == batch.num_tokens
        return AttentionPlan(buckets, rows, slots, whole)

    def write(self, plan: AttentionPlan, cache: torch.Tensor, new: torch.Tensor) -> None:
        """new [T, num_kv_heads, head_dim] -> its slots of cache [num_blocks, block_size, num_kv_heads, head_dim]."""
        rows = new if plan.written_rows is None else new[plan.written_rows]
        pages = as_moved(cache).view(-1, self.num_kv_heads, self.head_dim)
        pages.index_copy_(0, plan.written_slots, as_moved(to_kv(rows, cache.dtype)))

    def attend(
        self, plan: AttentionPlan, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> torch.Tensor:
        """q [T, num_heads, head_dim] -> [T, num_heads, head_dim]."""
        run = self._attend_tiles if self.numerics.batch_invariant else self._attend_sdpa
        if plan.whole:
            return run(plan.buckets[0], q, k_cache, v_cache)
        out = torch.empty_like(q)
        for bucket in plan.buckets:
            # Padding rows write their item's last row again, with the same value.
            out[bucket.token_rows] = run(bucket, q[bucket.token_rows], k_cache, v_cache)
        return out

    def _attend_tiles(
        self, bucket: Bucket, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> torch.Tensor:
        items, queries, tiles = bucket.num_items, bucket.num_queries, bucket.num_tiles
        heads, group, dim = self.num_kv_heads, self.group_size, self.head_dim
        q = (q * self.scale).view(items, queries, heads, group, dim)
        if queries * group < self.numerics.min_rows:
            padded = -(-self.numerics.min_rows // queries)
            q = F.pad(q, (0, 0, 0, padded - group))
            group = padded
        q = q.permute(0, 2, 1, 3, 4).reshape(items * heads, 1, queries * group, dim)
        q = q.expand(-1, tiles, -1, -1).reshape(-1, queries * group, dim)  # [I * heads * tiles, rows, dim]
        k = self._read(k_cache, bucket, q.dtype).view(-1, TILE, dim)
        v = self._read(v_cache, bucket, q.dtype).view(-1, TILE, dim)
        scores = torch.bmm(q, k.transpose(1, 2)).view(items, heads, tiles, queries, group, TILE)
        partial = slice(bucket.first_partial_tile, None)
        scores[:, :, partial] += bucket.distance
        peak = scores.amax(dim=(2, 5), keepdim=True)
        weights = scores.sub_(peak).clamp_(min=_LEAST).exp_()
        weights[:, :, partial] *= bucket.visible
        total = _tree_sum(weights.sum(dim=-1))  # [I, heads, queries, group]
        mixed = torch.bmm(weights.view(-1, queries * group, TILE), v)
        mixed = _tree_sum(mixed.view(items, heads, tiles, queries, group, dim))
        mixed = (mixed / total.unsqueeze(-1))[:, :, :, : self.group_size]
        return mixed.permute(0, 2, 1, 3, 4).reshape(-1, self.num_heads, dim)

    def _attend_sdpa(
        self, bucket: Bucket, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
    ) -> torch.Tensor:
        items, queries, dim = bucket.num_items, bucket.num_queries, self.head_dim
        q = q.view(items, queries, self.num_heads, dim).transpose(1, 2)
        k = self._read(k_cache, bucket, q.dtype).view(items, self.num_kv_heads, -1, dim)
        v = self._read(v_cache, bucket, q.dtype).view(items, self.num_kv_heads, -1, dim)
        visible = ~bucket.hidden.transpose(1, 2).reshape(items, 1, queries, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=self.scale, enable_gqa=True)
        return out.transpose(1, 2).reshape(-1, self.num_heads, dim)

    def _read(self, cache: torch.Tensor, bucket: Bucket, dtype: torch.dtype) -> torch.Tensor:
        """[I * num_kv_heads * L, head_dim]"""
        return from_kv(as_moved(cache).view(-1, self.head_dim).index_select(0, bucket.kv_rows), dtype)

    def _items(self, batch: StepBatch) -> dict[tuple[int, int], list[tuple[int, int, int, int]]]:
        """(padded queries, padded tiles) -> items (request, first row of T, first position, number of queries)."""
        found: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
        q_lens, seq_lens, starts = batch.q_lens.tolist(), batch.seq_lens.tolist(), batch.cu_seqlens_q.tolist()
        for request, (q_len, seq_len) in enumerate(zip(q_lens, seq_lens)):
            most = min(QUERY_ROWS, max(1, _MAX_SCORES // (self.num_heads * seq_len)))
            for begin in range(0, q_len, most):
                count = min(most, q_len - begin)
                position = seq_len - q_len + begin
                key = (1 << (count - 1).bit_length(), _rounded_tiles(-(-(position + count) // TILE)))
                found.setdefault(key, []).append((request, starts[request] + begin, position, count))
        return found

    def _make_bucket(
        self,
        items: list[tuple[int, int, int, int]],
        num_queries: int,
        num_tiles: int,
        table: np.ndarray,
        device: torch.device,
    ) -> list[Bucket]:
        """Index tensors of the items, in as many buckets as the gather bound asks for."""
        length = num_tiles * TILE
        step = max(1, _MAX_GATHER // (length * self.num_kv_heads * self.head_dim))
        made = []
        for begin in range(0, len(items), step):
            request, row, position, count = np.array(items[begin : begin + step], dtype=np.int64).T
            offset = np.minimum(np.arange(num_queries), count[:, None] - 1)  # [I, Q]
            positions = np.arange(length)
            # A position past the item's last one reads position 0: a finite value of the same sequence, weight zero.
            wanted = np.where(positions < (position + count)[:, None], positions, 0)  # [I, L]
            slots = table[request[:, None], wanted // self.block_size] * self.block_size + wanted % self.block_size
            kv_rows = slots[:, None, :] * self.num_kv_heads + np.arange(self.num_kv_heads)[:, None]  # [I, heads, L]
            hidden = positions.reshape(num_tiles, 1, TILE) > (position[:, None] + offset)[:, None, :, None]
            first = int(position.min()) // TILE
            visible = torch.from_numpy(~hidden[:, None, first:, :, None, :]).to(device, torch.float32)
            made.append(
                Bucket(
                    num_items=len(request),
                    num_queries=num_queries,
                    num_tiles=num_tiles,
                    token_rows=torch.from_numpy((row[:, None] + offset).reshape(-1)).to(device),
                    kv_rows=torch.from_numpy(kv_rows.reshape(-1)).to(device),
                    hidden=torch.from_numpy(hidden).to(device),
                    first_partial_tile=first,
                    visible=visible,
                    distance=(visible - 1) * _FAR,
                )
            )
        return made


def _tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over dim 2 by pairs of neighbours; zeros appended at the end change no bit of the result."""
    while x.shape[2] > 1:
        even = x.shape[2] // 2 * 2
        pairs = x[:, :, 0:even:2] + x[:, :, 1:even:2]
        x = pairs if even == x.shape[2] else torch.cat([pairs, x[:, :, even:]], dim=2)
    return x[:, :, 0]


def _rounded_tiles(num_tiles: int) -> int:
    """1, 2, 3, 4, 6, 8, 12, 16, ...: few bucket sizes, at most half of one wasted."""
    power = 1 << (num_tiles - 1).bit_length()
    return power * 3 // 4 if power >= 4 and num_tiles <= power * 3 // 4 else power
