"""Paged attention for tests: random steps over shuffled pages, what they should give, and the two attention kernels in
numpy, which read the same structs and index arrays as those on a GPU."""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from expertmesh.kernels import attention_reference
from expertmesh.kernels.kv_numbers import as_moved, from_kv, to_kv
from expertmesh.kernels.paged_attention import AttentionCall, PrefillCall


@dataclass
class Step:
    """Queries, pages and lengths of a step."""

    q_lens: np.ndarray
    seq_lens: np.ndarray
    block_table: np.ndarray
    q: torch.Tensor  # [T, num_heads, head_dim]
    k: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    v: torch.Tensor

    def reference(self) -> torch.Tensor:
        """[T, num_heads, head_dim] float64."""
        out = torch.zeros(self.q.shape, dtype=torch.float64, device=self.q.device)
        group = self.q.shape[1] // self.k.shape[2]
        begin = 0
        for r, (q_len, seq_len) in enumerate(zip(self.q_lens.tolist(), self.seq_lens.tolist())):
            blocks = self.block_table[r][: -(-seq_len // self.k.shape[1])]
            pages = torch.from_numpy(blocks.astype(np.int64)).to(self.k.device)
            k, v = (from_kv(as_moved(cache)[pages], torch.float64) for cache in (self.k, self.v))
            k, v = (x.flatten(0, 1)[:seq_len].repeat_interleave(group, 1) for x in (k, v))  # [L, heads, D]
            for first in range(0, q_len, 512):  # no more scores at a time than memory holds
                rows = slice(begin + first, begin + min(first + 512, q_len))
                scores = torch.einsum("qhd,khd->hqk", self.q[rows].double(), k) * k.shape[2] ** -0.5
                last = torch.arange(first, min(first + 512, q_len), device=k.device) + seq_len - q_len
                later = torch.arange(seq_len, device=k.device) > last[:, None]
                weights = scores.masked_fill_(later, -torch.inf).softmax(-1)
                out[rows] = torch.einsum("hqk,khd->qhd", weights, v)
            begin += q_len
        return out


def random_step(
    lengths: list[tuple[int, int]],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int = 128,
    block_size: int = 16,
    device: str = "cpu",
    seed: int = 0,
    width: int | None = None,
    kv_dtype: torch.dtype = torch.bfloat16,
) -> Step:
    """`lengths`: (new tokens, tokens in KV) of each request; pages of all requests are mixed, their rests poisoned."""
    generator = torch.Generator(device).manual_seed(seed)
    q_lens, seq_lens = (np.array(column, dtype=np.int32) for column in zip(*lengths))
    needed = -(-seq_lens // block_size)
    num_blocks = int(needed.sum()) + 3
    order = np.random.default_rng(seed).permutation(num_blocks).astype(np.int32)
    table = np.full((len(lengths), width or int(needed.max())), -1, dtype=np.int32)
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    k, v = (torch.randn(shape, device=device, generator=generator, dtype=torch.float32) for _ in range(2))
    used = 0
    for r, count in enumerate(needed.tolist()):
        table[r, :count] = order[used : used + count]
        used += count
        rest = int(seq_lens[r]) % block_size
        if rest:
            for cache in (k, v):
                cache[int(table[r, count - 1]), rest:] = torch.nan
    q = torch.randn(int(q_lens.sum()), num_heads, head_dim, device=device, generator=generator)
    return Step(q_lens, seq_lens, table, q.bfloat16(), to_kv(k, kv_dtype), to_kv(v, kv_dtype))


class NumpyKernels:
    """An AttentionLibrary in memory of the host."""

    widen = staticmethod(attention_reference.widen_kv)

    def __init__(
        self, head_dim: int, *, num_sms: int = 6, has_prefill: bool = True, kv_dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.head_dim, self.num_sms, self.has_prefill, self.kv_dtype = head_dim, num_sms, has_prefill, kv_dtype
        self.calls: list[Any] = []

    def attend(self, call: AttentionCall) -> None:
        self.calls.append(call)
        heads, kv_heads, dim = call.num_heads, call.num_kv_heads, self.head_dim
        group = heads // kv_heads
        q_starts, q_lens, kv_lens = (ints(p, call.num_requests) for p in (call.q_starts, call.q_lens, call.kv_lens))
        page_starts = ints(call.page_starts, call.num_requests + 1)
        chunk = int(ints(call.chunk_size, 1)[0])
        items = zip(*(ints(p, call.num_items) for p in (call.item_request, call.item_q_tile, call.item_chunk)))
        cut = bool(call.partial_o)
        if cut:
            o_starts, merge = ints(call.o_starts, call.num_requests), ints(call.merge_starts, call.num_rows + 1)
            partial_o = np.full((int(merge[-1]), heads, dim), np.nan)
            partial_lse = np.full((int(merge[-1]), heads), np.nan)
        for r, tile, c in items:
            rows = np.arange(tile * call.tile_q, min((tile + 1) * call.tile_q, q_lens[r] * group))
            k, v, positions = self._pages(call, page_starts[r], c * chunk, min(kv_lens[r], (c + 1) * chunk))
            num_chunks = max(1, -(-int(kv_lens[r]) // chunk))
            for head in range(heads):
                for token in sorted({int(row) // group for row in rows if row % group == head % group}):
                    q = _bf16(call.q, (q_starts[r] + token) * call.q_stride_n + head * call.q_stride_h, dim)
                    visible = positions <= kv_lens[r] - q_lens[r] + token
                    o, lse = _attention(q, k[visible, head // group], v[visible, head // group], call.scale)
                    if cut:
                        row = o_starts[r] + token * num_chunks + c
                        assert np.isnan(partial_lse[row, head]), "an item twice"
                        partial_o[row, head], partial_lse[row, head] = o, lse
                    else:
                        _store(call.o, ((q_starts[r] + token) * heads + head) * dim, o)
        if cut:
            for row in np.flatnonzero(np.diff(merge)).tolist():  # others are another call's
                part = slice(int(merge[row]), int(merge[row + 1]))
                assert not np.isnan(partial_lse[part]).any(), "an item is missing"
                for head in range(heads):
                    lse = partial_lse[part, head]
                    peak = lse.max(initial=-1e30)
                    weights = np.exp(lse - peak)
                    o = (weights[:, None] * partial_o[part, head]).sum(0) / max(float(weights.sum()), 1e-30)
                    _store(call.o, (row * heads + head) * dim, o)

    def attend_long(self, call: PrefillCall) -> None:
        self.calls.append(call)
        starts = ints(call.work_starts, self.num_sms + 1)
        group = call.num_heads // call.num_kv_heads
        names = ("head", "q_tile", "q_start", "page_start", "q_len", "kv_len")
        works = zip(*(ints(getattr(call, f"work_{n}"), int(starts[-1])) for n in names))
        for head, tile, q_start, page_start, q_len, kv_len in works:
            k, v, positions = self._pages(call, page_start, 0, kv_len)
            for token in range(tile * 128, min((tile + 1) * 128, q_len)):
                q = _bf16(call.q, (q_start + token) * call.q_stride_n + head * call.q_stride_h, self.head_dim)
                visible = positions <= kv_len - q_len + token
                o, _ = _attention(q, k[visible, head // group], v[visible, head // group], call.scale)
                _store(call.o, (q_start + token) * call.o_stride_n + head * call.o_stride_h, o)

    def _pages(self, call: Any, start: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """K, V [tokens, kv_heads, D] and positions of a request's tokens begin .. end."""
        positions = np.arange(begin, max(begin, end))
        if not len(positions):
            return *np.zeros((2, 0, call.num_kv_heads, self.head_dim)), positions
        blocks = ints(call.pages, int(start) + (int(end) - 1) // call.page_size + 1)[int(start) :]
        at = blocks[positions // call.page_size].astype(np.int64) * call.page_stride
        at += positions % call.page_size * call.kv_stride_n
        index = at[:, None, None] + np.arange(call.num_kv_heads)[:, None] * call.kv_stride_h + np.arange(self.head_dim)
        dtype = self.kv_dtype if isinstance(call, AttentionCall) else torch.bfloat16
        k, v = (_numbers(address, 0, int(index.max()) + 1, dtype)[index] for address in (call.k, call.v))
        return k, v, positions


def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> tuple[np.ndarray, float]:
    if not len(k):
        return np.zeros(q.shape), -np.inf
    scores = k @ q * scale
    weights = np.exp(scores - scores.max())
    return weights @ v / weights.sum(), float(scores.max() + np.log(weights.sum()))


def ints(address: int | None, count: int) -> np.ndarray:
    assert address
    return np.ctypeslib.as_array((ctypes.c_int32 * int(count)).from_address(address)).copy()


def _bf16(address: int, offset: int, count: int) -> np.ndarray:
    return _numbers(address, offset, count, torch.bfloat16)


def _numbers(address: int, offset: int, count: int, dtype: torch.dtype) -> np.ndarray:
    size = dtype.itemsize
    raw = (ctypes.c_char * (size * count)).from_address(address + size * int(offset))
    return torch.frombuffer(raw, dtype=dtype, count=count).double().numpy()


def _store(address: int, offset: int, values: np.ndarray) -> None:
    rows = torch.from_numpy(values).bfloat16().view(torch.int16).numpy()
    ctypes.memmove(address + 2 * int(offset), rows.tobytes(), rows.nbytes)
