"""Paged attention of the GPU engine: FlashInfer's kernels under a schedule of ours.

`plan` turns a step's lengths and block table into index arrays (`schedule.py`) and sends them to the GPU in one copy on
the current stream, from pinned memory that is not touched again before the copy is done; `attend` launches one to three
kernels that read them, for every layer. A decode step of a **bucket** runs in one of four forms: "few" (contexts so
short that one launch takes the qkv product whole: `kernels/decode_attention.py`), "short" (short ones on other GPUs or
in larger buckets: many small CTAs an SM), "whole", and "cut" (in chunks, where few requests would leave the GPU idle).
`forms` says which of them a bucket knows. A form always uses the same addresses and grid, so a CUDA graph captured
after one plan may be replayed after any later plan that returns the same key. Padding rows are requests
without KV and come out as zeros. Block-table rows are sent as they are, since a kernel finds a row by its start.

With `invariant` a token's bits depend on its own sequence alone: one tile of queries, aligned to positions (a step over
a KV tile that a row does not see is not quite without effect: its sums are scaled by 1 within rounding), KV chunks of
a fixed size from position 0 on, and chunks added up in order. So decode, chunked and whole prefill run the same sums.

KV in e4m3 is read as it is by decodes. What prompts read is widened to bf16 before them, layer by layer, into memory of
its own (`flash_wide.py` says why), but in the invariant mode, where one tile does everything.
Ideas: FlashInfer's plan and run; vLLM's persistent buffers for CUDA graphs."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np
import torch

from ...errors import KernelError
from ...kernels import decode_attention as few_decodes
from ...kernels.paged_attention import HEAD_SIZES, AttentionCall, AttentionLibrary, PrefillCall, load_library
from ...kernels.qk_norm_rope import Projected
from .flash_staging import TURNS, Form, Staging, clamp_pages
from .flash_wide import WidePages
from .schedule import SINGLE, Items, Works, aligned, choose_chunk, make_items, make_works, tile_for

LONG_QUERY = 128  # queries of this many tokens and more take the kernel for long queries
INVARIANT_TILE = 64  # decode and prefill alike
INVARIANT_CHUNK = 4096
SHORT = 512  # tokens of the longest context of the "short" form
FEW_REQUESTS, FEW_TOKENS = 256, 4096  # the largest bucket and the longest context of the "few" form
NEVER_WHOLE = 32  # buckets up to here that have the "few" form do not have "whole"
_CTAS_PER_SM = 2
_ROUNDS = 4  # of the whole GPU that chunks may add to a step with prompts: few tokens far into a context need some
_WIDE, _NARROW = 4, 1  # shares of KV that a warp takes at a time; narrow ones let more CTAs be at work on an SM


@dataclass(slots=True)
class _Planned:
    """What `attend` needs until the next plan."""

    num_tokens: int
    short: AttentionCall | None = None
    wide: AttentionCall | None = None  # short queries too, over widened pages
    long: PrefillCall | None = None
    few: Form | None = None  # one launch for these, from q, k and v
    widened: torch.Tensor | None = None  # [n] int32, blocks to widen for `wide` and `long`; None: they read the caches
    kept: list[torch.Tensor] = field(default_factory=list)  # what the calls point to
    checked: bool = False


@dataclass(frozen=True, slots=True)
class _Pages:
    """Where a call finds the pages of its requests."""

    starts: np.ndarray  # [R + 1] into the blocks
    blocks: np.ndarray | None  # block ids, of any shape; None: the widened pages, in their order


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
        kv_dtype: torch.dtype = torch.bfloat16,
        max_num_reqs: int = 256,
        max_num_blocks: int = 8192,
        invariant: bool = False,
        library: AttentionLibrary | None = None,
        wide_library: AttentionLibrary | None = None,
        num_sms: int | None = None,
    ) -> None:
        """`max_num_reqs`: the largest bucket; `max_num_blocks`: most blocks of one sequence. Raises KernelError where
        the kernels are missing or cannot do this model. The libraries and `num_sms` are for tests."""
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        uneven = num_heads % num_kv_heads or num_heads // num_kv_heads > 128
        if invariant and INVARIANT_TILE % (num_heads // num_kv_heads):
            raise KernelError(
                f"batch-invariant attention needs a power of two of up to {INVARIANT_TILE} heads a KV head, not "
                f"{num_heads} on {num_kv_heads}; set batch_invariant=false"
            )
        if dtype != torch.bfloat16 or head_dim not in HEAD_SIZES or uneven:
            raise KernelError(
                f"the attention kernels take bfloat16, head sizes {HEAD_SIZES} and up to 128 heads a KV head, not "
                f"{dtype}, {head_dim} with {num_heads} heads on {num_kv_heads}; choose attention='torch'"
            )
        if kv_dtype not in (torch.bfloat16, torch.float8_e4m3fn):
            raise KernelError(f"KV of {kv_dtype}: the attention kernels read bfloat16 and float8_e4m3fn")
        self.library = library or load_library(head_dim, self.device, kv_dtype)
        self.kv_dtype = kv_dtype
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.group_size, self.block_size, self.invariant = num_heads // num_kv_heads, block_size, invariant
        self.max_num_reqs, self.max_num_blocks = max_num_reqs, max_num_blocks
        self.num_sms = num_sms or torch.cuda.get_device_properties(self.device).multi_processor_count
        takes_few = few_decodes.takes(num_heads, num_kv_heads, head_dim, self.device)
        self._has_few = takes_few and not invariant
        self.overlap = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device)[0] >= 9
        self.slots = max(1, self.num_sms * _CTAS_PER_SM // num_kv_heads)  # items at work at once
        most = self._most_items(max_num_reqs, max_num_blocks * block_size)
        size = 6 * max_num_reqs + 3 * most + 8 + max_num_reqs * max_num_blocks
        self._fixed = torch.zeros(size, dtype=torch.int32, device=self.device)
        self._partial_o, self._partial_lse = self._partials(most)
        self._forms: dict[Hashable, Form] = {}
        self._staging = Staging(self.device)
        self.wide_library, self._wide = self.library, None
        if kv_dtype != torch.bfloat16 and not invariant:
            self._staging = Staging(self.device, 2 * TURNS)  # twice the copies for a step with prompts
            self.wide_library = wide_library or load_library(head_dim, self.device)
            self._wide = WidePages((block_size, num_kv_heads, head_dim), max_num_blocks, self.device)
        self._planned: _Planned | None = None
        self._chosen: tuple[Hashable, int] = (None, SINGLE)

    def plan(
        self,
        q_lens: np.ndarray,
        seq_lens: np.ndarray,
        block_table: np.ndarray,
        *,
        bucket: int | None = None,
        form: str | None = None,
    ) -> Hashable:
        """q_lens [R] new tokens, seq_lens [R] tokens in KV after them, block_table [R, any] int32 block ids.

        Host work and one asynchronous copy. With a `bucket` (all q_lens 1, R <= bucket) the key of the graphs that may
        be replayed now; without, None. `form` forces one, so that each of `forms` can be captured beforehand."""
        if bucket is not None:
            return self._plan_bucket(q_lens, seq_lens, block_table, bucket, form)
        self._plan_eager(q_lens, seq_lens, block_table)
        return None

    def forms(self, bucket: int) -> tuple[str, ...]:
        """All that steps of this bucket may need: each is a graph that a warm engine has."""
        if self.invariant:
            return "whole", "cut"
        if not self._few_tokens(bucket):
            return "short", "whole", "cut"
        return ("few", "cut") if bucket <= NEVER_WHOLE else ("few", "whole", "cut")

    def _few_tokens(self, bucket: int) -> int:
        """The longest context of the "few" form; 0: the bucket does not know it."""
        return FEW_TOKENS if self._has_few and bucket <= FEW_REQUESTS else 0

    @property
    def whole(self) -> Callable[..., torch.Tensor] | None:
        """In the "few" form, and then in place of `attend`: q, k and v as their product leaves them, in one launch."""
        return None if self._planned is None or self._planned.few is None else self._attend_whole

    def _attend_whole(
        self, projected: Projected, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert self._planned is not None
        assert self._planned.few is not None
        return few_decodes.decode_attention(
            *projected,
            k_cache,
            v_cache,
            *self._planned.few.requests,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            out=out,
        )

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
        stream = torch._C._cuda_getCurrentRawStream(self.device.index) if self.device.type == "cuda" else 0
        pointers = (q.data_ptr(), out.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), stream)
        if planned.short is not None:
            call = planned.short
            call.q, call.o, call.k, call.v, call.stream = pointers
            self.library.attend(call)
        if self._wide is not None and planned.widened is not None:
            self._wide.widen(self.library, k_cache, v_cache, planned.widened)
            pointers = (*pointers[:2], self._wide.k.data_ptr(), self._wide.v.data_ptr(), stream)
        if planned.wide is not None:
            call = planned.wide
            call.q, call.o, call.k, call.v, call.stream = pointers
            self.wide_library.attend(call)
        if planned.long is not None:
            long = planned.long
            long.q, long.o, long.k, long.v, long.stream = pointers
            self.wide_library.attend_long(long)
        return out

    def load(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        """Launch every kernel once, on zeros: what a long context is the first to need would else be loaded beside
        streams. Reads block 0 alone."""
        one, many = np.ones(1, np.int32), np.full(1, LONG_QUERY, np.int32)
        blocks, all_of_them = np.zeros((1, LONG_QUERY), np.int32), np.ones(1, bool)
        if self._has_few:
            self._load_few(k_cache, v_cache)
        cached = widened = _Pages(np.arange(2) * LONG_QUERY, blocks)
        q = torch.zeros(LONG_QUERY, self.num_heads, self.head_dim, dtype=torch.bfloat16, device=self.device)
        for tile_q, mma_kv in ((tile_q, mma_kv) for tile_q in (16, 64, 128) for mma_kv in (_WIDE, _NARROW)):
            items = make_items(one, one, group_size=self.group_size, tile_q=tile_q, chunk=LONG_QUERY)
            planned = self._planned = _Planned(1)
            planned.short = self._short_call(planned, items, one, one, cached)
            planned.short.mma_kv = mma_kv
            self.attend(q[:1], k_cache, v_cache)
        planned = self._planned = _Planned(LONG_QUERY)
        if self._wide is not None:
            planned.widened = self._send(planned, {}, blocks)["pages"]
            widened = _Pages(cached.starts, None)
            for tile_q in (64, 128):
                items = make_items(many, many, group_size=self.group_size, tile_q=tile_q, chunk=LONG_QUERY // 2)
                planned.wide = self._short_call(planned, items, many, many, widened)
                self.attend(q, k_cache, v_cache)
        if self.wide_library.has_prefill:
            works = make_works(many, many, all_of_them, num_heads=self.num_heads, num_ctas=self.num_sms)
            planned.long = self._long_call(planned, works, many, many, widened)
            self.attend(q, k_cache, v_cache)
        self._planned = None

    def _load_few(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        """For rows of padding, of which nothing is read: in all ways in which buckets share the work."""
        one, num_normed = np.ones(1, np.int32), self.num_heads + self.num_kv_heads
        most = min(FEW_REQUESTS, self.max_num_reqs)
        for bucket in sorted({min(1 << power, most) for power in range(most.bit_length() + 1)}):
            self._plan_bucket(one, one, np.zeros((1, 1), np.int32), bucket, "few")
            place = torch.zeros(bucket, dtype=torch.int64, device=self.device)
            shape = bucket, num_normed + self.num_kv_heads, self.head_dim
            zeros = torch.zeros(shape, dtype=torch.bfloat16, device=self.device)
            qkv, qk_norm, cos_sin = zeros.view(bucket, -1), zeros[0, :num_normed], zeros[0, :1].float()
            self._attend_whole(Projected(qkv, qk_norm, 0.0, cos_sin, place, place - 1), k_cache, v_cache)

    def reserve(self, num_tokens: int) -> None:
        """Pinned memory for the plan of any step of so many tokens: the block table of all requests, and its works and
        items, five words for each 128 tokens and head and less."""
        self._staging.reserve(len(self._fixed) + 8 * num_tokens + 4096)

    # ------------------------------------------------------------------------------------------------------------ plans
    def _plan_bucket(
        self, q_lens: np.ndarray, seq_lens: np.ndarray, block_table: np.ndarray, bucket: int, form: str | None
    ) -> Hashable:
        num_reqs = len(q_lens)
        if not 0 < num_reqs <= bucket <= self.max_num_reqs or int(q_lens.max()) != 1:
            raise KernelError(
                f"{num_reqs} requests of up to {int(q_lens.max(initial=0))} new tokens do not fit a decode bucket of "
                f"{bucket}; the largest bucket is {self.max_num_reqs}"
            )
        longest = int(seq_lens.max())
        most = self._most_items(bucket, longest)
        form, chunk = self._form_of(seq_lens, bucket, longest, most, form)
        num_items = most if form == "cut" else bucket
        key = (bucket, form, num_items)
        made = self._forms.get(key)
        if made is None:
            made = self._forms[key] = self._make_form(bucket, form, num_items)
        table = self._used_columns(longest, block_table)
        if made.num_fixed + table.size > len(self._fixed):
            raise KernelError(
                f"{table.shape[1]} blocks of each of {num_reqs} sequences exceed the room set aside for block tables; "
                f"raise max_num_blocks ({self.max_num_blocks})"
            )
        made.send(self._staging, self._fixed, seq_lens, table, chunk)
        self._planned = _Planned(bucket, made.call, few=made if form == "few" else None)
        return key

    def _form_of(self, seq_lens: np.ndarray, bucket: int, longest: int, most: int, form: str | None) -> tuple[str, int]:
        """The form of a decode step and its chunk; a given form is taken as it is."""
        if self.invariant:
            cut = longest > INVARIANT_CHUNK or form == "cut"
            return ("cut", INVARIANT_CHUNK) if cut else ("whole", SINGLE)
        few_tokens = self._few_tokens(bucket)
        if form is None and longest <= few_tokens:
            form = "few"
        if form is None:
            chunk = self._chunk_of(seq_lens, longest, bucket, most)
            if chunk == SINGLE and few_tokens and bucket <= NEVER_WHOLE:
                chunk = longest  # beside such contexts the second launch is little; "whole" would be a graph a bucket
            if chunk != SINGLE:
                return "cut", chunk
            return ("short" if longest <= SHORT and not few_tokens else "whole"), SINGLE
        return form, max(128, longest) if form == "cut" else SINGLE

    def _chunk_of(self, seq_lens: np.ndarray, longest: int, bucket: int, most: int) -> int:
        """What was chosen a step ago, as long as the lengths are about the same."""
        num_reqs = len(seq_lens)
        about = (bucket, num_reqs, longest // 128, int(seq_lens.sum()) // (128 * num_reqs))
        if about != self._chosen[0]:
            spare = most - bucket  # what is there without a chunk more for each request as it grows
            one = np.ones(num_reqs, np.int64)
            chunk = choose_chunk(seq_lens, one, slots=self.slots, kv_heads=self.num_kv_heads, most_items=spare)
            self._chosen = about, chunk
        return self._chosen[1]

    def _make_form(self, bucket: int, form: str, num_items: int) -> Form:
        """Measured on an H100 (`bench/attention.py`, docs/performance.md): which tile is fastest for which form."""
        if form == "few":
            return Form(bucket, num_items, False, None, self._fixed)
        small = tile_for(1, self.group_size)
        tile_q, mma_kv, fp8 = small, _WIDE, self.kv_dtype != torch.bfloat16
        if self.invariant:
            tile_q = INVARIANT_TILE
        elif form == "short":
            tile_q, mma_kv = (small if bucket <= 64 or fp8 else max(64, small)), _NARROW
        elif form == "cut" and bucket <= 8 and not fp8:
            tile_q = max(64, small)
        call = self._new_call(tile_q, mma_kv, num_requests=bucket + 1, num_items=num_items, num_rows=bucket)
        made = Form(bucket, num_items, form == "cut", call, self._fixed)
        if form == "cut":
            call.fill(partial_o=self._partial_o, partial_lse=self._partial_lse)
        return made

    def _plan_eager(self, q_lens: np.ndarray, seq_lens: np.ndarray, block_table: np.ndarray) -> None:
        planned = _Planned(int(q_lens.sum()))
        table = self._used_columns(int(seq_lens.max()), block_table)
        cached = _Pages(np.arange(len(table) + 1) * table.shape[1], table)
        if self.invariant:
            items, lens, ends, request = self._invariant_items(q_lens, seq_lens)
            pages = _Pages(cached.starts[np.append(request, len(table))], table)
            planned.short = self._short_call(planned, items, lens, ends, pages)
            self._planned = planned
            return
        prompts, read = np.ones(len(q_lens), bool), cached
        if self._wide is not None:
            more_than_a_tile = tile_for(1, self.group_size) < q_lens * self.group_size
            prompts = self._wide.with_room(seq_lens, more_than_a_tile)
        if self._wide is not None and prompts.any():
            starts, blocks = self._wide.place(seq_lens, table, prompts)
            planned.widened = self._send(planned, {}, blocks)["pages"]
            read = _Pages(starts, None)
        long = prompts & (q_lens >= LONG_QUERY) & self.wide_library.has_prefill
        if long.any():
            works = make_works(q_lens, seq_lens, long, num_heads=self.num_heads, num_ctas=self.num_sms)
            if works.pay(q_lens, seq_lens, long, num_heads=self.num_heads):
                planned.long = self._long_call(planned, works, q_lens, seq_lens, read)
            else:
                long[:] = False
        short, wide = ~long, np.zeros(len(q_lens), bool)
        if planned.widened is not None:
            short, wide = ~prompts, prompts & ~long
        if short.any():
            planned.short = self._short_call(planned, self._items(q_lens, seq_lens, short), q_lens, seq_lens, cached)
        if wide.any():
            planned.wide = self._short_call(planned, self._items(q_lens, seq_lens, wide), q_lens, seq_lens, read)
        self._planned = planned

    def _invariant_items(
        self, q_lens: np.ndarray, seq_lens: np.ndarray
    ) -> tuple[Items, np.ndarray, np.ndarray, np.ndarray]:
        """Items; the lengths that they are of, and which request each of those is a part of."""
        chunk = INVARIANT_CHUNK if int(seq_lens.max()) > INVARIANT_CHUNK else SINGLE
        lens, ends, request = aligned(q_lens, seq_lens, INVARIANT_TILE // self.group_size)
        items = make_items(lens, ends, group_size=self.group_size, tile_q=INVARIANT_TILE, chunk=chunk)
        return items, lens, ends, request

    def _items(self, q_lens: np.ndarray, seq_lens: np.ndarray, chosen: np.ndarray) -> Items:
        tile_q = tile_for(int(q_lens[chosen].max()), self.group_size)
        tiles = np.where(chosen, -(-q_lens.astype(np.int64) * self.group_size // tile_q), 0)
        chunk = choose_chunk(
            seq_lens,
            tiles,
            slots=self.slots,
            kv_heads=self.num_kv_heads,
            most_items=int(tiles.sum()) + _ROUNDS * self.slots,
            num_rows=int(q_lens.sum()),
        )
        return make_items(q_lens, seq_lens, group_size=self.group_size, tile_q=tile_q, chunk=chunk, chosen=chosen)

    def _most_items(self, bucket: int, longest: int) -> int:
        """Items of the largest grid of a bucket whose contexts are cut."""
        if not self.invariant:
            return 2 * bucket + self.slots
        chunks = -(-max(longest, INVARIANT_CHUNK + 1) // INVARIANT_CHUNK)
        return bucket * (1 << (chunks - 1).bit_length())

    def _new_call(self, tile_q: int, mma_kv: int, **sizes: int) -> AttentionCall:
        return AttentionCall(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            page_size=self.block_size,
            tile_q=tile_q,
            mma_kv=mma_kv,
            num_sms=self.num_sms,
            device=self.device.index or 0,
            overlap=self.overlap,
            scale=self.head_dim**-0.5,
            **sizes,
        )

    def _partials(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        o = torch.empty(rows, self.num_heads, self.head_dim, dtype=torch.bfloat16, device=self.device)
        return o, torch.empty(rows, self.num_heads, dtype=torch.float32, device=self.device)

    def _short_call(
        self, planned: _Planned, items: Items, q_lens: np.ndarray, seq_lens: np.ndarray, pages: _Pages
    ) -> AttentionCall:
        num_reqs, num_rows = len(q_lens), int(q_lens.sum())
        q_starts = np.cumsum(q_lens) - q_lens
        parts: dict[str, np.ndarray] = {
            "q_starts": q_starts,
            "q_lens": q_lens,
            "kv_lens": seq_lens,
            "page_starts": pages.starts,
            "item_request": items.request,
            "item_q_tile": items.q_tile,
            "item_chunk": items.kv_chunk,
            "chunk_size": np.array([items.chunk]),
        }
        if items.cut:
            merge_starts = np.zeros(num_rows + 1, np.int64)
            np.cumsum(np.repeat(items.num_chunks, q_lens), out=merge_starts[1:])
            parts |= {"merge_starts": merge_starts, "o_starts": merge_starts[q_starts]}
        pointers = self._send(planned, parts, pages.blocks)
        call = self._new_call(items.tile_q, _WIDE, num_requests=num_reqs, num_items=items.num_items, num_rows=num_rows)
        call.fill(**pointers)
        if items.cut:
            partial_o, partial_lse = self._partials(int(merge_starts[-1]))
            call.fill(partial_o=partial_o, partial_lse=partial_lse)
            planned.kept += [partial_o, partial_lse]
        return call

    def _long_call(
        self, planned: _Planned, works: Works, q_lens: np.ndarray, seq_lens: np.ndarray, pages: _Pages
    ) -> PrefillCall:
        request = works.request
        parts = {
            "work_starts": works.starts,
            "work_head": works.head,
            "work_q_tile": works.q_tile,
            "work_q_start": (np.cumsum(q_lens) - q_lens)[request],
            "work_page_start": pages.starts[request],
            "work_q_len": q_lens[request],
            "work_kv_len": seq_lens[request],
        }
        call = PrefillCall(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            page_size=self.block_size,
            num_tokens=int(q_lens.sum()),
            device=self.device.index or 0,
            scale=self.head_dim**-0.5,
            o_stride_n=self.num_heads * self.head_dim,
            o_stride_h=self.head_dim,
        )
        call.fill(**self._send(planned, parts, pages.blocks))
        return call

    def _used_columns(self, longest: int, block_table: np.ndarray) -> np.ndarray:
        width = max(1, -(-longest // self.block_size))
        if width > block_table.shape[1]:
            raise KernelError(
                f"a sequence of {longest} tokens needs {width} blocks of {self.block_size}; the block table has "
                f"{block_table.shape[1]}"
            )
        return block_table[:, :width]

    def _send(
        self, planned: _Planned, parts: dict[str, np.ndarray], blocks: np.ndarray | None
    ) -> dict[str, torch.Tensor]:
        """One copy of all parts and the blocks (None: widened pages are read) to the device; where they lie there."""
        sizes = [*map(len, parts.values()), 0 if blocks is None else blocks.size]
        total = sum(sizes)
        host = self._staging.take(total)
        device = torch.empty(total, dtype=torch.int32, device=self.device)
        for at, part in zip(np.cumsum(sizes).tolist(), parts.values()):
            host[at - len(part) : at] = part
        if blocks is not None:
            clamp_pages(blocks, host[total - blocks.size : total])
        self._staging.send(total, device)
        planned.kept.append(device)
        lies = dict(zip((*parts, "pages"), device.split(sizes)))
        if blocks is None:
            assert self._wide is not None
            lies["pages"] = self._wide.order
        return lies

    def _check(self, planned: _Planned, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        """Once a plan: all layers are alike."""
        assert planned.few is None, "a plan of the form that takes the qkv product whole: attend is not for it"
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
        kv = self.kv_dtype
        for name, x, dtype in (("q", q, torch.bfloat16), ("k_cache", k_cache, kv), ("v_cache", v_cache, kv)):
            if x.dtype != dtype or x.device != self.device:
                raise KernelError(f"{name}: {x.dtype} on {x.device}; expected {dtype} on {self.device}")
        widened = k_cache if self._wide is None else self._wide.k
        for call, pages in ((planned.short, k_cache), (planned.wide, widened), (planned.long, widened)):
            if call is not None:
                call.fill(
                    page_stride=pages.stride(0),
                    kv_stride_n=pages.stride(1),
                    kv_stride_h=pages.stride(2),
                    q_stride_n=q.stride(0),
                    q_stride_h=q.stride(1),
                )
        planned.checked = True
