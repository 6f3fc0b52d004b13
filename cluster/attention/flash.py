"""Paged attention of the GPU engine: FlashInfer's kernels under a schedule of ours.

`plan` turns a step's lengths and block table into index arrays (`schedule.py`) and sends them to the GPU in one copy on
the current stream, from pinned memory that is not touched again before the copy is done; `attend` launches one to three
kernels that read them, for every layer. A decode step of a **bucket** always uses the same addresses and grid, so what
was captured in a CUDA graph after one plan may be replayed after any later plan that returns the same graph key; its
padding rows are requests without KV, and come out as zeros. Block-table rows are sent as they are: a kernel finds a
row by its start, so nothing is flattened a step.

With `invariant` a token's bits depend on its own sequence alone: one query tile, KV chunks of a fixed size aligned to
position 0, and chunks added up in order, so decode, chunked and whole prefill run the same sums (`test_flash_gpu.py`).
Ideas: FlashInfer's plan and run; vLLM's persistent buffers for CUDA graphs."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...errors import KernelError
from ...kernels.paged_attention import HEAD_SIZES, AttentionCall, AttentionLibrary, PrefillCall, load_library
from .schedule import SINGLE, Items, Works, choose_chunk, make_items, make_works, tile_for

LONG_QUERY = 64  # queries of this many tokens and more take the kernel for long queries
INVARIANT_TILE = 64  # decode and prefill alike
INVARIANT_CHUNK = 4096
_CTAS_PER_SM = 2


@dataclass(slots=True)
class _Planned:
    """What `attend` needs until the next plan."""

    num_tokens: int
    short: AttentionCall | None
    long: PrefillCall | None
    kept: list[torch.Tensor]  # what the calls point to
    checked: bool = False


class FlashAttention:
    """One a runner. Engine thread only."""

    capturable = True

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        device: torch.device | str,
        *,
        dtype: torch.dtype = torch.bfloat16,
        max_num_reqs: int = 256,
        max_num_blocks: int = 8192,
        invariant: bool = False,
        library: AttentionLibrary | None = None,
        num_sms: int | None = None,
    ) -> None:
        """`max_num_reqs`: the largest bucket; `max_num_blocks`: most blocks of one sequence. Raises KernelError where
        the kernels are missing or cannot do this model. `library` and `num_sms` are for tests."""
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        if dtype != torch.bfloat16 or head_dim not in HEAD_SIZES or num_heads % num_kv_heads:
            raise KernelError(
                f"the attention kernels take bfloat16 and head sizes {HEAD_SIZES}, not {dtype}, {head_dim} with "
                f"{num_heads} heads on {num_kv_heads}; choose attention='torch'"
            )
        self.library = library or load_library(head_dim, self.device)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.group_size, self.block_size, self.invariant = num_heads // num_kv_heads, block_size, invariant
        self.max_num_reqs, self.max_num_blocks = max_num_reqs, max_num_blocks
        self.num_sms = num_sms or torch.cuda.get_device_properties(self.device).multi_processor_count
        self.overlap = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device)[0] >= 9
        self.slots = max(1, self.num_sms * _CTAS_PER_SM // num_kv_heads)  # items at work at once
        most = self._most_items(max_num_reqs, max_num_blocks * block_size, self._decode_tile()[1])
        size = 6 * max_num_reqs + 3 * most + 8 + max_num_reqs * max_num_blocks
        self._fixed = torch.zeros(size, dtype=torch.int32, device=self.device)
        self._partial_o, self._partial_lse = self._partials(most)
        self._staging = _Staging(self.device)
        self._planned: _Planned | None = None

    def plan(
        self,
        q_lens: np.ndarray,
        seq_lens: np.ndarray,
        block_table: np.ndarray,
        *,
        bucket: int | None = None,
        cut: bool | None = None,
    ) -> Hashable:
        """q_lens [R] new tokens, seq_lens [R] tokens in KV after them, block_table [R, any] int32 block ids.

        Host work and one asynchronous copy. With a `bucket` (all q_lens 1, R <= bucket) the key of the graphs that may
        be replayed now; without, None. `cut` forces one of a bucket's two forms (contexts in chunks or whole), so that
        both can be captured beforehand."""
        if bucket is not None:
            return self._plan_bucket(q_lens, seq_lens, block_table, bucket, cut)
        self._plan_eager(q_lens, seq_lens, block_table)
        return None

    def attend(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """q [T, num_heads, head_dim], caches [num_blocks, block_size, num_kv_heads, head_dim] with this step's K and V
        already written -> [T, num_heads, head_dim]. T is the bucket's size after a plan with a bucket."""
        planned = self._planned
        assert planned is not None, "attend before plan"
        if not planned.checked:
            self._check(planned, q, k_cache, v_cache)
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        pointers = (q.data_ptr(), out.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), stream)
        if planned.short is not None:
            call = planned.short
            call.q, call.o, call.k, call.v, call.stream = pointers
            self.library.attend(call)
        if planned.long is not None:  # after the short ones, whose second kernel zeroes the other rows
            long = planned.long
            long.q, long.o, long.k, long.v, long.stream = pointers
            self.library.attend_long(long)
        return out

    # ------------------------------------------------------------------------------------------------------------ plans
    def _plan_bucket(
        self, q_lens: np.ndarray, seq_lens: np.ndarray, block_table: np.ndarray, bucket: int, cut: bool | None
    ) -> Hashable:
        num_reqs = len(q_lens)
        if not 0 < num_reqs <= bucket <= self.max_num_reqs or int(q_lens.max()) != 1:
            raise KernelError(
                f"{num_reqs} requests of up to {int(q_lens.max(initial=0))} new tokens do not fit a decode bucket of "
                f"{bucket}; the largest bucket is {self.max_num_reqs}"
            )
        ones = np.ones(bucket, np.int32)
        lens = np.zeros(bucket, np.int32)
        lens[:num_reqs] = seq_lens
        longest = int(lens.max())
        tile_q, tiles = self._decode_tile()
        most = self._most_items(bucket, longest, tiles)
        if self.invariant:
            chunk = INVARIANT_CHUNK if longest > INVARIANT_CHUNK or cut else SINGLE
        elif cut is None:
            chunk = choose_chunk(lens, np.full(bucket, tiles), slots=self.slots, most_items=most)
        else:
            chunk = min(SINGLE - 1, max(128, longest)) if cut else SINGLE
        items = make_items(ones, lens, group_size=self.group_size, tile_q=tile_q, chunk=chunk)
        num_items = most if items.cut else bucket * tiles
        short, kept = self._short_call(items, ones, lens, block_table, num_items, fixed=True)
        self._planned = _Planned(bucket, short, None, kept)
        return (bucket, num_items, items.cut)

    def _plan_eager(self, q_lens: np.ndarray, seq_lens: np.ndarray, block_table: np.ndarray) -> None:
        long = q_lens >= LONG_QUERY if self.library.has_prefill and not self.invariant else np.zeros(len(q_lens), bool)
        planned = _Planned(int(q_lens.sum()), None, None, [])
        if not long.all():
            tile_q = INVARIANT_TILE if self.invariant else tile_for(q_lens[~long], self.group_size)
            tiles = np.where(long, 0, -(-q_lens.astype(np.int64) * self.group_size // tile_q))
            if self.invariant:
                chunk = INVARIANT_CHUNK if int(seq_lens.max()) > INVARIANT_CHUNK else SINGLE
            else:
                most = int(tiles.sum()) + self.slots
                chunk = choose_chunk(seq_lens, tiles, slots=self.slots, most_items=most)
            items = make_items(q_lens, seq_lens, group_size=self.group_size, tile_q=tile_q, chunk=chunk, chosen=~long)
            planned.short, kept = self._short_call(items, q_lens, seq_lens, block_table, items.num_items, fixed=False)
            planned.kept += kept
        if long.any():
            works = make_works(q_lens, seq_lens, long, num_heads=self.num_heads, num_ctas=self.num_sms)
            planned.long, kept = self._long_call(works, q_lens, seq_lens, block_table)
            planned.kept += kept
        self._planned = planned

    def _decode_tile(self) -> tuple[int, int]:
        """Query tile of a decode step, and how many of them a request has."""
        tile_q = INVARIANT_TILE if self.invariant else tile_for(np.ones(1, np.int32), self.group_size)
        return tile_q, -(-self.group_size // tile_q)

    def _most_items(self, bucket: int, longest: int, tiles: int) -> int:
        """Items of the largest grid of a bucket whose contexts are cut."""
        if not self.invariant:
            return bucket * tiles + self.slots
        chunks = -(-max(longest, INVARIANT_CHUNK + 1) // INVARIANT_CHUNK)
        return bucket * tiles * (1 << (chunks - 1).bit_length())

    def _partials(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        o = torch.empty(rows, self.num_heads, self.head_dim, dtype=torch.bfloat16, device=self.device)
        return o, torch.empty(rows, self.num_heads, dtype=torch.float32, device=self.device)

    def _short_call(
        self,
        items: Items,
        q_lens: np.ndarray,
        seq_lens: np.ndarray,
        block_table: np.ndarray,
        num_items: int,
        *,
        fixed: bool,
    ) -> tuple[AttentionCall, list[torch.Tensor]]:
        num_reqs, num_rows = len(q_lens), int(q_lens.sum())
        table = self._used_columns(seq_lens, block_table)
        nobody = np.zeros(1, np.int32)  # one request more, without tokens: padding items are its
        q_starts = np.cumsum(q_lens) - q_lens
        padding = np.zeros(num_items - items.num_items, np.int32)
        parts: dict[str, Any] = {
            "q_starts": q_starts,
            "_0": nobody,
            "q_lens": q_lens,
            "_1": nobody,
            "kv_lens": seq_lens,
            "_2": nobody,
            "page_starts": np.minimum(np.arange(num_reqs + 2), len(table)) * table.shape[1],
            "item_request": items.request,
            "_3": padding + num_reqs,
            "item_q_tile": items.q_tile,
            "_4": padding,
            "item_chunk": items.kv_chunk,
            "_5": padding,
            "chunk_size": np.array([items.chunk], np.int32),
        }
        num_partials = 0
        if items.cut:
            merge_starts = np.zeros(num_rows + 1, np.int32)
            np.cumsum(np.repeat(items.num_chunks, q_lens), out=merge_starts[1:])
            num_partials = int(merge_starts[-1])
            parts |= {"merge_starts": merge_starts, "o_starts": merge_starts[q_starts], "_6": nobody}
        pointers, kept = self._send(parts, table, fixed=fixed)
        call = AttentionCall(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            page_size=self.block_size,
            num_requests=num_reqs + 1,
            num_items=num_items,
            num_rows=num_rows,
            tile_q=items.tile_q,
            num_sms=self.num_sms,
            device=self.device.index or 0,
            overlap=self.overlap,
            scale=self.head_dim**-0.5,
            **pointers,
        )
        if items.cut:
            partial_o, partial_lse = (self._partial_o, self._partial_lse) if fixed else self._partials(num_partials)
            assert num_partials <= len(partial_o)
            call.fill(partial_o=partial_o, partial_lse=partial_lse)
            kept += [partial_o, partial_lse]
        return call, kept

    def _long_call(
        self, works: Works, q_lens: np.ndarray, seq_lens: np.ndarray, block_table: np.ndarray
    ) -> tuple[PrefillCall, list[torch.Tensor]]:
        table = self._used_columns(seq_lens, block_table)
        request = works.request
        parts = {
            "work_starts": works.starts,
            "work_head": works.head,
            "work_q_tile": works.q_tile,
            "work_q_start": (np.cumsum(q_lens) - q_lens)[request],
            "work_page_start": request * table.shape[1],
            "work_q_len": q_lens[request],
            "work_kv_len": seq_lens[request],
        }
        pointers, kept = self._send(parts, table, fixed=False)
        call = PrefillCall(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            page_size=self.block_size,
            num_tokens=int(q_lens.sum()),
            device=self.device.index or 0,
            scale=self.head_dim**-0.5,
            o_stride_n=self.num_heads * self.head_dim,
            o_stride_h=self.head_dim,
            **pointers,
        )
        return call, kept

    def _used_columns(self, seq_lens: np.ndarray, block_table: np.ndarray) -> np.ndarray:
        width = max(1, -(-int(seq_lens.max(initial=0)) // self.block_size))
        if width > block_table.shape[1]:
            raise KernelError(
                f"a sequence of {int(seq_lens.max())} tokens needs {width} blocks of {self.block_size}; the block "
                f"table has {block_table.shape[1]}"
            )
        return block_table[:, :width]

    def _send(
        self, parts: dict[str, np.ndarray], table: np.ndarray, *, fixed: bool
    ) -> tuple[dict[str, int], list[torch.Tensor]]:
        """One copy of all parts and the table to the device; pointers by name. `_` names are padding of the part before
        them."""
        total = sum(map(len, parts.values())) + table.size
        if fixed and total > len(self._fixed):
            raise KernelError(
                f"a bucket's plan of {total} numbers exceeds the {len(self._fixed)} set aside: {table.shape[1]} blocks "
                f"of {len(table)} sequences; raise max_num_blocks ({self.max_num_blocks})"
            )
        host = self._staging.take(total)
        device = self._fixed[:total] if fixed else torch.empty(total, dtype=torch.int32, device=self.device)
        base, offset, pointers = device.data_ptr(), 0, {}
        for name, part in parts.items():
            host[offset : offset + len(part)] = part
            if name[0] != "_":
                pointers[name] = base + 4 * offset
            offset += len(part)
        np.maximum(
            table, 0, out=host[offset:total].reshape(table.shape), casting="unsafe"
        )  # -1 is no page to compute an address from
        pointers["pages"] = base + 4 * offset
        self._staging.send(total, device)
        return pointers, [device]

    def _check(self, planned: _Planned, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        """Once a plan: all layers are alike."""
        page = (self.block_size, self.num_kv_heads, self.head_dim)
        wanted = (planned.num_tokens, self.num_heads, self.head_dim)
        if tuple(q.shape) != wanted or q.stride(2) != 1:
            raise KernelError(
                f"q: shape {tuple(q.shape)}, strides {q.stride()}; this plan takes {wanted}, rows contiguous"
            )
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            if tuple(cache.shape[1:]) != page or cache.stride(3) != 1 or cache.stride() != k_cache.stride():
                raise KernelError(
                    f"{name}: shape {tuple(cache.shape)}, strides {cache.stride()}; expected [num_blocks, {page}] "
                    "with the same strides in both caches"
                )
        for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
            if x.dtype != torch.bfloat16 or x.device != self.device:
                raise KernelError(f"{name}: {x.dtype} on {x.device}; expected bfloat16 on {self.device}")
        for call in (planned.short, planned.long):
            if call is not None:
                call.fill(
                    page_stride=k_cache.stride(0),
                    kv_stride_n=k_cache.stride(1),
                    kv_stride_h=k_cache.stride(2),
                    q_stride_n=q.stride(0),
                    q_stride_h=q.stride(1),
                )
        planned.checked = True


class _Staging:
    """Pinned memory, in turns: a piece is written again only when the copy from it is done."""

    def __init__(self, device: torch.device, *, turns: int = 4) -> None:
        self.cuda = device.type == "cuda"
        self._pieces = [torch.empty(0, dtype=torch.int32) for _ in range(turns)]
        self._sent: list[torch.cuda.Event | None] = [None] * turns
        self._turn = 0

    def take(self, size: int) -> np.ndarray:
        """[size] int32 to write; `send` follows."""
        self._turn = (self._turn + 1) % len(self._pieces)
        event = self._sent[self._turn]
        if event is not None:
            event.synchronize()  # four plans ago: done long since, unless plans outrun the GPU
        if len(self._pieces[self._turn]) < size:
            room = 1 << (size - 1).bit_length()
            self._pieces[self._turn] = torch.empty(room, dtype=torch.int32, pin_memory=self.cuda)
        view: np.ndarray = self._pieces[self._turn].numpy()[:size]
        return view

    def send(self, size: int, to: torch.Tensor) -> None:
        to.copy_(self._pieces[self._turn][:size], non_blocking=True)
        if self.cuda:
            event = self._sent[self._turn]
            if event is None:
                event = self._sent[self._turn] = torch.cuda.Event()
            event.record(torch.cuda.current_stream(to.device))
