"""The GPU engine's attention without a GPU: schedules, index arrays and addresses, with the kernels in numpy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from flash_world import NumpyKernels, Step, ints, random_step

from expertmesh.cluster.attention import flash, flash_wide
from expertmesh.cluster.attention.flash import FlashAttention
from expertmesh.cluster.attention.flash_torch import TorchAttention, select_attention
from expertmesh.cluster.attention.schedule import SINGLE, aligned, choose_chunk, make_items, make_works
from expertmesh.deploy import build_attention
from expertmesh.errors import KernelError
from expertmesh.kernels import paged_attention
from expertmesh.kernels.flashinfer_fixes import FIXES

HEADS, KV_HEADS, DIM = 4, 2, 64
E4M3 = torch.float8_e4m3fn


def make(kernels: NumpyKernels, **options) -> FlashAttention:
    options = {"max_num_reqs": 8, "max_num_blocks": 64} | options
    return FlashAttention(HEADS, KV_HEADS, DIM, 16, "cpu", library=kernels, num_sms=kernels.num_sms, **options)


def step_of(*lengths: tuple[int, int], seed: int = 0, kv_dtype: torch.dtype = torch.bfloat16) -> Step:
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM}
    return random_step(list(lengths), **sizes, seed=seed, kv_dtype=kv_dtype)


def attend(attention: FlashAttention, step: Step, bucket: int | None = None) -> torch.Tensor:
    attention.plan(step.q_lens, step.seq_lens, step.block_table, bucket=bucket)
    q = step.q
    if bucket is not None:
        q = torch.cat([q, torch.full((bucket - len(q), HEADS, DIM), torch.nan, dtype=q.dtype)])
    return attention.attend(q, step.k, step.v)


def assert_close(actual: torch.Tensor, step: Step) -> None:
    torch.testing.assert_close(actual.double(), step.reference(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("num_sms", [1, 6, 40])
def test_decode_of_a_bucket(num_sms):
    step = step_of((1, 1), (1, 16), (1, 17), (1, 700), (1, 129))
    attention = make(NumpyKernels(DIM, num_sms=num_sms))
    out = attend(attention, step, bucket=8)
    assert_close(out[:5], step)
    assert not out[5:].any(), "padding requests give zeros"


def test_few_decodes_of_short_contexts_are_planned_for_one_launch(monkeypatch):
    """The arrays of requests alone, at the same addresses for a key; another form beyond either limit."""
    monkeypatch.setattr(flash, "FEW_REQUESTS", 4)
    monkeypatch.setattr(flash, "FEW_TOKENS", 64)
    monkeypatch.setattr(flash.few_decodes, "takes", lambda *_: True)
    attention = make(NumpyKernels(DIM))
    assert attention.forms(4) == ("few", "cut")
    assert attention.forms(5) == ("short", "whole", "cut")
    seen = {}
    for lengths in ((1, 40), (64, 3, 17, 1), (20,)):
        step = step_of(*((1, n) for n in lengths))
        key = attention.plan(step.q_lens, step.seq_lens, step.block_table, bucket=4)
        assert key[:2] == (4, "few")
        assert attention.whole is not None
        kv_lens, page_starts, pages = attention._planned.few.requests
        assert seen.setdefault(key, kv_lens.data_ptr()) == kv_lens.data_ptr()
        assert kv_lens.tolist() == [*lengths, *[0] * (4 - len(lengths))]
        for row, (length, start) in enumerate(zip(lengths, page_starts.tolist())):
            count = -(-length // 16)
            assert pages[start : start + count].tolist() == step.block_table[row, :count].tolist()
    with pytest.raises(AssertionError, match="whole"):
        attention.attend(torch.zeros(4, HEADS, DIM, dtype=torch.bfloat16), step.k, step.v)
    for lengths, bucket, form in (((1, 65), 4, None), ((1, 40), 8, None), ((1, 40), 4, "cut")):
        step = step_of(*((1, n) for n in lengths))
        assert attention.plan(step.q_lens, step.seq_lens, step.block_table, bucket=bucket, form=form)[1] != "few"
        assert attention.whole is None


@pytest.mark.parametrize("invariant", [False, True], ids=["plain", "invariant"])
@pytest.mark.parametrize("takes_few", [False, True])
def test_steps_take_the_forms_that_their_buckets_name_and_no_others(takes_few, invariant, monkeypatch):
    """The forms are what a warm engine has graphs of: one too many costs time and memory, one too few a capture beside
    streams."""
    monkeypatch.setattr(flash, "FEW_REQUESTS", 48)
    monkeypatch.setattr(flash, "FEW_TOKENS", 1000)
    monkeypatch.setattr(flash, "INVARIANT_CHUNK", 1024)
    monkeypatch.setattr(flash.few_decodes, "takes", lambda *_: takes_few)
    attention = make(NumpyKernels(DIM, num_sms=40), invariant=invariant, max_num_reqs=64, max_num_blocks=128)
    draw, taken = np.random.default_rng(0), dict[tuple[str, ...], set[str]]()
    for bucket in (1, 4, 32, 48, 64):
        forms = attention.forms(bucket)
        for longest in (20, 500, 700, 1000, 1001, 1500, 2000):
            for num_reqs in {1, 1 + bucket // 2, bucket}:
                for lens in (np.full(num_reqs, longest), draw.integers(1, longest, num_reqs, endpoint=True)):
                    table = np.zeros((num_reqs, 128), np.int32)
                    key = attention.plan(np.ones(num_reqs, np.int32), lens.astype(np.int32), table, bucket=bucket)
                    taken.setdefault(forms, set()).add(key[1])
    assert all(set(forms) == found for forms, found in taken.items()), taken


def test_a_bucket_of_few_is_cut_even_where_cutting_does_not_pay(monkeypatch):
    monkeypatch.setattr(flash.few_decodes, "takes", lambda *_: True)
    monkeypatch.setattr(flash, "FEW_TOKENS", 500)
    kernels = NumpyKernels(DIM, num_sms=2)
    attention = make(kernels)
    step = step_of(*((1, 700) for _ in range(8)))
    assert attention.plan(step.q_lens, step.seq_lens, step.block_table, bucket=8)[1] == "cut"
    assert_close(attend(attention, step, bucket=8), step)
    assert kernels.calls[-1].partial_o
    monkeypatch.setattr(flash.few_decodes, "takes", lambda *_: False)
    assert make(kernels).plan(step.q_lens, step.seq_lens, step.block_table, bucket=8)[1] == "whole"


def test_long_contexts_are_cut_where_the_gpu_would_idle():
    kernels = NumpyKernels(DIM, num_sms=40)
    step = step_of((1, 900))
    assert_close(attend(make(kernels), step, bucket=1), step)
    assert kernels.calls[-1].partial_o
    assert kernels.calls[-1].num_items == 2 * 1 + 40
    short = step_of((1, 60))
    assert_close(attend(make(kernels), short, bucket=1), short)
    assert not kernels.calls[-1].partial_o


@pytest.mark.parametrize("has_prefill", [True, False])
@pytest.mark.parametrize("num_sms", [1, 16])
def test_mixed_lengths(has_prefill, num_sms):
    kernels = NumpyKernels(DIM, num_sms=num_sms, has_prefill=has_prefill)
    step = step_of((1, 400), (70, 70), (3, 35), (130, 140), (1, 1), (20, 300), (64, 64))
    assert_close(attend(make(kernels), step), step)
    assert len(kernels.calls) == (2 if has_prefill else 1)
    assert kernels.calls[0].tile_q == (64 if has_prefill else 128)


def test_whole_prefill_is_one_launch():
    kernels = NumpyKernels(DIM)
    step = step_of((128, 128), (200, 200))
    assert_close(attend(make(kernels), step), step)
    assert [type(c).__name__ for c in kernels.calls] == ["PrefillCall"]


def test_strided_queries_and_caches():
    kernels = NumpyKernels(DIM)
    step = step_of((1, 40), (100, 100))
    qkv = torch.full((101, HEADS + 2 * KV_HEADS, DIM), torch.nan, dtype=torch.bfloat16)
    qkv[:, :HEADS] = step.q
    both = torch.stack([step.k, step.v], dim=1)
    attention = make(kernels)
    attention.plan(step.q_lens, step.seq_lens, step.block_table)
    assert_close(attention.attend(qkv[:, :HEADS], both[:, 0], both[:, 1]), step)


def test_every_kernel_is_launched_once_before_anybody_waits_for_it():
    kernels = NumpyKernels(DIM)
    pages = torch.zeros(2, 16, KV_HEADS, DIM, dtype=torch.bfloat16)
    make(kernels).load(pages, pages)
    short = [(c.tile_q, c.mma_kv) for c in kernels.calls if isinstance(c, paged_attention.AttentionCall)]
    assert sorted(short) == [(16, 1), (16, 4), (64, 1), (64, 4), (128, 1), (128, 4)]
    assert all(c.partial_o for c in kernels.calls[:-1]), "and the kernel that adds chunks up"
    assert isinstance(kernels.calls[-1], paged_attention.PrefillCall)


@pytest.mark.parametrize("has_prefill", [True, False])
@pytest.mark.parametrize("num_sms", [1, 16])
def test_fp8_kv_is_read_as_it_is_by_decodes_and_widened_for_prompts(has_prefill, num_sms):
    kernels = NumpyKernels(DIM, num_sms=num_sms, kv_dtype=E4M3)
    wide = NumpyKernels(DIM, num_sms=num_sms, has_prefill=has_prefill)
    attention = make(kernels, kv_dtype=E4M3, wide_library=wide)
    mixed = step_of((1, 400), (70, 70), (200, 900), (130, 140), (1, 1), (20, 300), (128, 128), kv_dtype=E4M3)
    assert_close(attend(attention, mixed), mixed)
    assert [c.tile_q for c in kernels.calls] == [16]
    assert [type(c).__name__ for c in wide.calls] == ["AttentionCall", "PrefillCall"][: 1 + has_prefill]
    decode = step_of((1, 900), (1, 3), (1, 64), kv_dtype=E4M3)
    for bucket in (4, None):
        assert_close(attend(attention, decode, bucket)[:3], decode)
    prompts = step_of((40, 40), (30, 300), kv_dtype=E4M3)
    assert_close(attend(attention, prompts), prompts)
    assert len(kernels.calls) == 3, "prompts need none of it"
    attention.load(decode.k, decode.v)


def test_fp8_kv_in_the_invariant_mode_is_read_by_one_tile(monkeypatch):
    kernels = NumpyKernels(DIM, kv_dtype=E4M3)
    attention = make(kernels, kv_dtype=E4M3, invariant=True)
    step = step_of((1, 400), (70, 70), (200, 900), (1, 1), kv_dtype=E4M3)
    assert_close(attend(attention, step), step)
    assert [c.tile_q for c in kernels.calls] == [flash.INVARIANT_TILE]


def test_prompts_whose_pages_find_no_room_are_read_as_they_are(monkeypatch):
    monkeypatch.setattr(flash_wide, "WIDE_TOKENS", 32 * 16)
    kernels, wide = NumpyKernels(DIM, kv_dtype=E4M3), NumpyKernels(DIM)
    attention = make(kernels, kv_dtype=E4M3, max_num_blocks=32, wide_library=wide)
    step = step_of((200, 200), (100, 300), (150, 150), (128, 128), kv_dtype=E4M3)  # 13, 19, 10 and 8 pages; 32 fit
    assert_close(attend(attention, step), step)
    (short,), (over_wide, long) = kernels.calls, wide.calls
    assert set(ints(short.item_request, short.num_items).tolist()) == {2, 3}
    assert set(ints(over_wide.item_request, over_wide.num_items).tolist()) == {1}
    assert long.work_starts
    with pytest.raises(KernelError, match=r"k_cache: torch\.bfloat16 on cpu; expected torch\.float8_e4m3fn"):
        attend(attention, step_of((1, 5)))
    with pytest.raises(KernelError, match=r"KV of torch\.float16"):
        make(kernels, kv_dtype=torch.float16)


def test_a_graph_key_means_the_same_addresses_and_grid():
    """Every field of the struct is as it was at capture, but for q, o and the caches, which are the caller's."""
    kernels = NumpyKernels(DIM, num_sms=40)
    attention = make(kernels)
    fields = [n for n, _ in paged_attention.AttentionCall._fields_ if n not in ("q", "o", "k", "v")]
    seen: dict = {}
    for seed, lengths in enumerate([(1,), (900,), (5, 6, 7), (300, 2, 800, 17), (64, 1000, 1, 1)]):
        step = step_of(*((1, n) for n in lengths), seed=seed)
        for form in (None, "short", "whole", "cut"):
            key = attention.plan(step.q_lens, step.seq_lens, step.block_table, bucket=4, form=form)
            q = torch.cat([step.q, step.q.new_zeros(4 - len(step.q), HEADS, DIM)])
            assert_close(attention.attend(q, step.k, step.v)[: len(step.q)], step)
            call = kernels.calls[-1]
            assert seen.setdefault(key, {n: getattr(call, n) for n in fields}) == {n: getattr(call, n) for n in fields}
    assert len(seen) == 3


@pytest.mark.parametrize("bucket", [None, 4])
def test_invariant_mode_has_one_tile_and_fixed_chunks(monkeypatch, bucket):
    monkeypatch.setattr(flash, "INVARIANT_CHUNK", 64)
    kernels = NumpyKernels(DIM, num_sms=40)
    attention = make(kernels, invariant=True)
    for lengths in [((1, 10), (1, 64)), ((1, 65), (1, 300), (1, 3))]:
        step = step_of(*lengths)
        assert_close(attend(attention, step, bucket)[: len(lengths)], step)
        assert kernels.calls[-1].tile_q == flash.INVARIANT_TILE
        assert bool(kernels.calls[-1].partial_o) == (max(n for _, n in lengths) > 64)
    prefill = step_of((70, 130), (1, 20), (100, 100), (5, 200), (50, 99))
    assert_close(attend(attention, prefill), prefill)
    assert {(c.tile_q, type(c).__name__) for c in kernels.calls} == {(flash.INVARIANT_TILE, "AttentionCall")}


def test_staging_is_not_written_before_its_copy_is_done():
    """Plans made ahead of the GPU use other pinned pieces."""
    kernels = NumpyKernels(DIM)
    attention = make(kernels)
    step = step_of((1, 40))
    pieces = set()
    for _ in range(8):
        attention.plan(step.q_lens, step.seq_lens, step.block_table, bucket=1)
        pieces.add(attention._staging._pieces[attention._staging._turn].data_ptr())
    assert len(pieces) == 4


# --------------------------------------------------------------------------------------------------------- schedule
def test_chunks_follow_the_free_ctas():
    def chunk(lens: list[int], slots: int = 66, most: int | None = None) -> int:
        most = len(lens) + slots if most is None else most
        return choose_chunk(np.array(lens), np.ones(len(lens), np.int64), slots=slots, kv_heads=4, most_items=most)

    assert chunk([192]) == SINGLE, "cutting 192 tokens costs a launch and saves less"
    assert chunk([4096]) == 128
    assert chunk([4096] * 8) == 512
    assert chunk([1024] * 32) == SINGLE, "128 CTAs read about as fast as memory does"
    assert chunk([4096] * 256) == SINGLE, "the GPU is full anyway"
    assert chunk([192] * 32 + [131072]) < 8192, "one long context beside short ones"
    assert chunk([]) == SINGLE
    for lens in ([4096] * 3, [131072, 5], [700] * 60):
        best = chunk(lens, most=len(lens) + 10)
        assert sum(-(-n // best) for n in lens) <= len(lens) + 10


def test_every_row_has_its_items_once():
    rng = np.random.default_rng(0)
    for _ in range(50):
        num_reqs = int(rng.integers(1, 9))
        seq_lens = rng.integers(1, 900, num_reqs)
        q_lens = np.minimum(rng.integers(1, 200, num_reqs), seq_lens)
        chosen = rng.random(num_reqs) < 0.7
        chunk = int(rng.choice([64, 128, SINGLE]))
        items = make_items(q_lens, seq_lens, group_size=8, tile_q=64, chunk=chunk, chosen=chosen)
        triples = set(zip(items.request.tolist(), items.q_tile.tolist(), items.kv_chunk.tolist()))
        expected = {
            (r, t, c)
            for r in range(num_reqs)
            if chosen[r]
            for t in range(-(-int(q_lens[r]) * 8 // 64))
            for c in range(-(-int(seq_lens[r]) // chunk))
        }
        assert triples == expected
        assert len(triples) == items.num_items
        works = make_works(q_lens, seq_lens, ~chosen, num_heads=4, num_ctas=7)
        pairs = list(zip(works.request.tolist(), works.q_tile.tolist(), works.head.tolist()))
        assert len(set(pairs)) == len(pairs) == works.starts[-1]
        assert {p[:2] for p in pairs} == {
            (r, t) for r in range(num_reqs) if not chosen[r] for t in range(-(-int(q_lens[r]) // 128))
        }
        assert (np.diff(works.starts).max() - np.diff(works.starts).min()) <= 1


def test_no_tile_lies_across_a_multiple():
    q_lens, seq_lens = np.array([1, 65, 3, 8, 7, 4]), np.array([6, 66, 8, 8, 13, 11])
    lens, ends, request = aligned(q_lens, seq_lens, 4)
    assert lens.tolist() == [1, 3, 62, 3, 8, 2, 5, 1, 3]
    assert ends.tolist() == [6, 4, 66, 8, 8, 8, 13, 8, 11]
    assert request.tolist() == [0, 1, 1, 2, 3, 4, 4, 5, 5]


def test_works_are_dealt_evenly():
    q_lens = np.array([8192])
    works = make_works(q_lens, q_lens, np.array([True]), num_heads=32, num_ctas=132)
    cost = (works.q_tile + 1.0).tolist()
    each = [sum(cost[a:b]) for a, b in zip(works.starts[:-1], works.starts[1:])]
    assert max(each) / (sum(each) / len(each)) < 1.05


@pytest.mark.parametrize(
    ("queries", "pays"),
    [
        ([(2048, 2048)], True),
        ([(128, 128)], True),
        ([(1024, 1024)] * 16, True),
        ([(1024, 9000)], True),
        ([(512, 17000), (1, 300)], True),
        ([(300, 16000)], True),
        ([(200, 28000)], False),  # 64 works for 132 CTAs, each of 28,000 tokens
        ([(150, 40000), (1, 300)], False),
        ([(128, 131072)], False),
        ([(128, 131072), (2048, 2048)], False),
    ],
    ids=str,
)
def test_few_tokens_far_into_a_context_take_the_kernel_that_cuts_it(queries, pays):
    q_lens, seq_lens = (np.array(column, np.int32) for column in zip(*queries))
    chosen = q_lens >= flash.LONG_QUERY
    works = make_works(q_lens, seq_lens, chosen, num_heads=32, num_ctas=132)
    assert works.pay(q_lens, seq_lens, chosen, num_heads=32) is pays


def test_a_step_whose_long_queries_do_not_pay_is_one_call():
    kernels = NumpyKernels(DIM, num_sms=40)
    step = step_of((130, 1000), (1, 40), (3, 35))
    attention = make(kernels)
    assert_close(attend(attention, step), step)
    assert [type(c).__name__ for c in kernels.calls] == ["AttentionCall"]
    assert kernels.calls[0].partial_o


# ----------------------------------------------------------------------------------------------------------- errors
def test_errors_say_what_to_do(monkeypatch, tmp_path):
    attention = make(NumpyKernels(DIM))
    step = step_of((1, 40))
    with pytest.raises(KernelError, match="largest bucket is 8"):
        attention.plan(step.q_lens, step.seq_lens, step.block_table, bucket=9)
    with pytest.raises(KernelError, match="do not fit a decode bucket"):
        attention.plan(np.array([2]), step.seq_lens, step.block_table, bucket=4)
    with pytest.raises(KernelError, match="block table has 3"):
        attention.plan(step.q_lens, np.array([60]), step.block_table)
    attention.plan(step.q_lens, step.seq_lens, step.block_table)
    with pytest.raises(KernelError, match="q: shape"):
        attention.attend(step.q.repeat(2, 1, 1), step.k, step.v)
    with pytest.raises(KernelError, match="v_cache: shape"):
        attention.attend(step.q, step.k, step.v[:, :8])
    with pytest.raises(KernelError, match=r"k_cache: torch\.float16"):
        attention.attend(step.q, step.k.half(), step.v.half())
    with pytest.raises(KernelError, match="attention='torch'"):
        make(NumpyKernels(DIM), dtype=torch.float16)
    with pytest.raises(KernelError, match="power of two"):
        FlashAttention(40, 8, DIM, 16, "cpu", library=NumpyKernels(DIM), num_sms=6, invariant=True)
    monkeypatch.setattr(paged_attention, "PACKAGE", "expertmesh_attention_of_nobody")
    with pytest.raises(KernelError, match="not built"):
        paged_attention._load(DIM, "sm_90a")


def test_a_library_of_other_sources_is_refused(monkeypatch, tmp_path):
    paged_attention._load.cache_clear()
    package = tmp_path / "expertmesh_attention_test"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "paged_attention_64_sm_90a.so").touch()
    (package / "key.txt").write_text("other\n")
    monkeypatch.setattr(paged_attention, "PACKAGE", package.name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(KernelError, match=r"of sources other"):
        paged_attention._load(64, "sm_90a")
    with pytest.raises(KernelError, match="no attention kernel for head size 128 and bf16 KV"):
        paged_attention._load(128, "sm_90a")
    with pytest.raises(KernelError, match="head size 64 and fp8 KV on sm_90a"):
        paged_attention._load(64, "sm_90a", True)
    (package / "key.txt").write_text(paged_attention.source_key())
    with pytest.raises(KernelError, match="cannot be loaded"):
        paged_attention._load(64, "sm_90a")
    with pytest.raises(KernelError, match="too old"):
        paged_attention.architecture(7, 5)
    assert [paged_attention.architecture(*c) for c in ((8, 0), (9, 0), (10, 0))] == ["sm_80", "sm_90a", "sm_100a"]


# ---------------------------------------------------------------------------------------------------- without kernels
def test_torch_path_is_chosen_loudly(caplog):
    chosen = select_attention("auto", HEADS, KV_HEADS, DIM, 16, "cpu")
    assert isinstance(chosen, TorchAttention)
    assert "attention runs in torch, slowly and without CUDA graphs: the attention kernels run on a GPU" in caplog.text
    for choice, invariant in (("flash", False), ("auto", True), ("torch", True), ("other", False)):
        with pytest.raises(KernelError, match="choose"):
            select_attention(choice, HEADS, KV_HEADS, DIM, 16, "cpu", invariant=invariant)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, E4M3])
def test_torch_path_gives_the_same(kv_dtype):
    attention = select_attention("torch", HEADS, KV_HEADS, DIM, 16, "cpu", kv_dtype=kv_dtype)
    step = step_of((1, 400), (70, 70), (3, 35), (130, 140), (1, 1), (20, 300), kv_dtype=kv_dtype)
    attention.plan(step.q_lens, step.seq_lens, step.block_table)
    assert_close(attention.attend(step.q, step.k, step.v), step)


# ---------------------------------------------------------------------------------------------------------- the build
def test_build_commands():
    names = [build_attention.wanted(arch) for arch in ("sm_90a", "sm_80")]
    short = [
        ("paged_attention", 64),
        ("paged_attention", 128),
        ("paged_attention_fp8", 64),
        ("paged_attention_fp8", 128),
    ]
    assert names == [[("paged_prefill", 128), *short], short]
    line = build_attention.command("nvcc", "paged_attention", 64, "sm_89", includes=[Path("/x")], out=Path("/y"))
    assert {"-gencode=arch=compute_89,code=sm_89", "-DHEAD_SIZE=64", "-DSHARED_KIB_PER_SM=100", "-I/x"} <= set(line)
    assert line[-1] == "/y/paged_attention_64_sm_89.so"
    line = build_attention.command("nvcc", "paged_attention_fp8", 128, "sm_90a", includes=[], out=Path("/y"))
    assert "-DKV_FP8=1" in line
    assert line[-3].endswith("/paged_attention.cu")
    assert line[-1] == "/y/paged_attention_fp8_128_sm_90a.so"


def test_headers_are_fixed_or_refused(tmp_path):
    for name in {name for name, _, _ in FIXES}:
        header = tmp_path / "include" / name
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text("".join(["first\n", *(before for of, before, _ in FIXES if of == name), "last\n"]))
    fixed = build_attention.fix(tmp_path / "include", tmp_path / "a")
    for name, before, after in FIXES:
        text = (fixed / name).read_text()
        assert after in text
        assert before in after or before not in text
    header.write_text("another version\n")
    with pytest.raises(KernelError, match="is not the header"):
        build_attention.fix(tmp_path / "include", tmp_path / "b")


def test_headers_of_another_version_are_refused(tmp_path):
    (tmp_path / "flashinfer" / "data").mkdir(parents=True)
    with pytest.raises(KernelError, match="is not flashinfer-python"):
        build_attention.headers(tmp_path, tmp_path)
    (tmp_path / f"flashinfer_python-{paged_attention.FLASHINFER}.dist-info").mkdir()
    (tmp_path / f"flashinfer_python-{paged_attention.FLASHINFER}.dist-info" / "METADATA").touch()
    assert build_attention.headers(tmp_path, tmp_path) == tmp_path / "flashinfer" / "data"
