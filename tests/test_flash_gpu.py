"""Paged attention on a GPU: ugly shapes against float64, captured graphs under changing plans, bits of the invariant
mode."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flash_world import Step, random_step

from expertmesh.cluster.attention import flash
from expertmesh.cluster.attention.flash import FlashAttention
from expertmesh.cluster.attention.flash_torch import select_attention
from expertmesh.errors import KernelError
from expertmesh.kernels.kv_numbers import as_moved, from_kv, to_kv

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
try:
    FlashAttention(8, 1, 128, 16, "cuda", max_num_reqs=1, max_num_blocks=1)
except KernelError as error:
    pytest.skip(str(error), allow_module_level=True)

E4M3 = torch.float8_e4m3fn
KV_DTYPES = [torch.bfloat16, E4M3]
GROUPS = [(64, 4), (32, 4), (4, 2), (8, 8), (64, 2)]  # 16:1, 8:1, 2:1, 1:1, 32:1: two query tiles a request


@pytest.fixture(autouse=True)
def _no_launch_of_q_k_and_v(monkeypatch):
    """`attend` in all its forms; `test_decode_attention_gpu.py` has the one that takes the product whole."""
    monkeypatch.setattr(flash, "FEW_REQUESTS", 0)


def make(heads: tuple[int, int], head_dim: int = 128, **options) -> FlashAttention:
    options = {"max_num_reqs": 320, "max_num_blocks": 1024} | options
    return FlashAttention(*heads, head_dim, 16, "cuda", **options)


def step_of(heads: tuple[int, int], lengths: list[tuple[int, int]], seed: int = 0, **options) -> Step:
    return random_step(lengths, num_heads=heads[0], num_kv_heads=heads[1], device="cuda", seed=seed, **options)


def run(attention: FlashAttention, step: Step, bucket: int | None = None, form: str | None = None) -> torch.Tensor:
    attention.plan(step.q_lens, step.seq_lens, step.block_table, bucket=bucket, form=form)
    return attention.attend(padded(step, bucket), step.k, step.v, out=poisoned(attention, step, bucket))


def padded(step: Step, bucket: int | None) -> torch.Tensor:
    if bucket is None:
        return step.q
    rest = torch.full((bucket - len(step.q), *step.q.shape[1:]), torch.nan, dtype=step.q.dtype, device="cuda")
    return torch.cat([step.q, rest])


def poisoned(attention: FlashAttention, step: Step, bucket: int | None) -> torch.Tensor:
    for partial in (attention._partial_o, attention._partial_lse):
        partial.fill_(torch.nan)
    return torch.full((bucket or len(step.q), *step.q.shape[1:]), torch.nan, dtype=step.q.dtype, device="cuda")


def error_of(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def assert_right(actual: torch.Tensor, step: Step) -> None:
    """NaN never passes; single values within a few roundings of bf16."""
    expected = step.reference()
    assert error_of(actual, expected) < 5e-3
    torch.testing.assert_close(actual.double(), expected, atol=2e-2, rtol=2e-2)


DECODES = {
    "one token": [1],
    "block borders": [15, 16, 17, 31, 32, 33, 127, 128, 129, 4096],
    "one long beside short": [3, 16000, 100, 1, 260],
    "300 requests": [1 + 7 * i % 611 for i in range(300)],
}


@pytest.mark.parametrize("kv_dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("heads", GROUPS, ids=str)
@pytest.mark.parametrize("name", DECODES)
@pytest.mark.parametrize("form", [None, "short", "whole", "cut"])
def test_decode(heads, name, form, kv_dtype):
    lengths = [(1, n) for n in DECODES[name]]
    step = step_of(heads, lengths, kv_dtype=kv_dtype)
    attention = make(heads, kv_dtype=kv_dtype)
    bucket = min(320, len(lengths) + 5)
    out = run(attention, step, bucket, form)
    assert_right(out[: len(lengths)], step)
    assert not out[len(lengths) :].any(), "padding rows are zeros"
    assert_right(run(attention, step), step)


MIXED = {
    "whole prompts": [(1, 1), (2, 2), (63, 63), (64, 64), (127, 127), (128, 128), (129, 129), (1000, 1000)],
    "chunks": [(64, 100), (65, 1000), (512, 4096), (1, 5), (7, 7), (200, 3000)],
    "decode and a chunk": [(1, 300)] * 20 + [(900, 2500)] + [(1, 17)] * 3,
    "rests of prompts": [(2, 400), (5, 2000), (17, 17), (33, 3000), (1, 1)],
    "a long context": [(1, 9000), (100, 9000), (30, 9000)],
}


@pytest.mark.parametrize("kv_dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("heads", GROUPS, ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_mixed_lengths(heads, name, kv_dtype):
    step = step_of(heads, MIXED[name], kv_dtype=kv_dtype)
    assert_right(run(make(heads, kv_dtype=kv_dtype), step), step)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES, ids=str)
def test_head_size_64(kv_dtype):
    for lengths in (MIXED["chunks"], MIXED["rests of prompts"], [(1, n) for n in DECODES["block borders"]]):
        step = step_of((4, 2), lengths, head_dim=64, kv_dtype=kv_dtype)
        assert_right(run(make((4, 2), 64, kv_dtype=kv_dtype), step), step)
    assert_right(run(make((4, 2), 64, kv_dtype=kv_dtype), step, bucket=16)[:10], step)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES, ids=str)
def test_128k_tokens(kv_dtype):
    heads = (32, 4)
    length = 131072
    attention = make(heads, max_num_blocks=length // 16, max_num_reqs=8, kv_dtype=kv_dtype)
    step = step_of(heads, [(1, length), (1, 1000)], kv_dtype=kv_dtype)
    assert_right(run(attention, step, bucket=4)[:2], step)
    step = step_of(heads, [(70, length), (1, 100), (16, length - 5)], kv_dtype=kv_dtype)
    assert_right(run(attention, step), step)
    step = step_of(heads, [(300, length), (128, 1000), (1, 100)], kv_dtype=kv_dtype)
    assert_right(run(attention, step), step)


@pytest.mark.parametrize("invariant", [False, True])
def test_fp8_kv_gives_what_bf16_kv_of_the_same_numbers_gives(invariant):
    """Every e4m3 number is a bf16 one. Bit for bit what is widened before the kernel; where the kernel widens, products
    have their columns in another order."""
    heads = (32, 4)
    for name in MIXED:
        step = step_of(heads, MIXED[name], kv_dtype=E4M3)
        wide = replace(step, k=from_kv(step.k, torch.bfloat16), v=from_kv(step.v, torch.bfloat16))
        actual = run(make(heads, kv_dtype=E4M3, invariant=invariant), step)
        expected = run(make(heads, invariant=invariant), wide)
        assert error_of(actual, expected.double()) < 5e-3
    step = step_of(heads, [*MIXED["whole prompts"][-3:], (70, 900)], kv_dtype=E4M3)
    wide = replace(step, k=from_kv(step.k, torch.bfloat16), v=from_kv(step.v, torch.bfloat16))
    attention = make(heads, kv_dtype=E4M3, invariant=invariant)
    same = torch.equal(run(attention, step), run(make(heads, invariant=invariant), wide))
    assert same or invariant
    assert (attention._planned.long is None) == (attention._planned.wide is None) == invariant


def test_strided_queries_and_caches():
    heads = (32, 4)
    step = step_of(heads, MIXED["decode and a chunk"])
    qkv = torch.full((len(step.q), 40, 128), torch.nan, dtype=torch.bfloat16, device="cuda")
    qkv[:, :32] = step.q
    both = torch.stack([step.k, step.v], dim=1)
    attention = make(heads)
    attention.plan(step.q_lens, step.seq_lens, step.block_table)
    assert_right(attention.attend(qkv[:, :32], both[:, 0], both[:, 1]), step)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("invariant", [False, True])
def test_a_captured_graph_serves_every_later_plan_of_its_key(invariant, kv_dtype):
    heads, bucket = (32, 4), 8
    attention = make(heads, invariant=invariant, kv_dtype=kv_dtype)
    blocks = 4096
    cache = to_kv(torch.randn(2, blocks, 16, heads[1], 128, device="cuda"), kv_dtype)
    q = torch.zeros(bucket, heads[0], 128, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)
    graphs: dict = {}
    replayed = 0
    cases = [[5], [700] * 8, [16000, 3], [1] * 5, [9000] * 3, [40, 41, 42], [5000, 1, 1, 1], [300] * 7, [12000] * 2]
    for seed, lengths in enumerate(cases):
        step = step_of(heads, [(1, n) for n in lengths], seed=seed, kv_dtype=kv_dtype)
        assert len(step.k) <= blocks
        for pages, own in zip(as_moved(cache), (step.k, step.v)):
            pages[: len(own)] = as_moved(own)
        key = attention.plan(step.q_lens, step.seq_lens, step.block_table, bucket=bucket)
        q.fill_(torch.nan)
        q[: len(lengths)] = step.q
        out.fill_(torch.nan)
        if key not in graphs:
            attention.attend(q, cache[0], cache[1], out=out)  # loads the kernel
            torch.cuda.synchronize()
            graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[key]):
                for _ in range(3):  # layers
                    attention.attend(q, cache[0], cache[1], out=out)
            out.fill_(torch.nan)
        else:
            replayed += 1
        graphs[key].replay()
        assert_right(out[: len(lengths)], step)
        assert not out[len(lengths) :].any()
    assert replayed >= 4
    assert len(graphs) <= (4 if invariant else 3)


def test_plans_ahead_of_the_gpu():
    """Plans and launches queue up behind a busy stream; each launch sees its own plan."""
    heads = (32, 4)
    attention = make(heads)
    steps = [step_of(heads, [(1, 10 + 50 * i), (1, 3)], seed=i) for i in range(12)]
    x = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    outs = []
    for i in range(12):
        for _ in range(3):
            x = x @ x * 1e-3
        attention.plan(steps[i].q_lens, steps[i].seq_lens, steps[i].block_table, bucket=2)
        outs.append(attention.attend(steps[i].q, steps[i].k, steps[i].v))
    for out, step in zip(outs, steps):
        assert_right(out, step)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(64, 4), (32, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("length", [700, 9500])
def test_invariant_mode_gives_the_same_bits_in_every_company(heads, length, kv_dtype):
    attention = make(heads, invariant=True, kv_dtype=kv_dtype)
    whole = step_of(heads, [(length, length), (40, 5000)], seed=3, kv_dtype=kv_dtype)
    expected = run(attention, whole)[:length]
    assert_right(run(attention, whole), whole)
    chosen = sorted(
        {0, 1, 15, 16, 17, 63, 64, 127, 128, 500, length // 2, length - 2, length - 1, min(4096, length - 1)}
    )
    for position in sorted(chosen):  # decode: alone, in company, in a bucket, in both of its forms
        alone = cut_out(whole, [(position, position + 1)])
        for bucket, form in ((None, None), (4, None), (64, None), (4, "cut")):
            out = run(attention, alone, bucket, form)
            assert torch.equal(out[0], expected[position]), (position, bucket, form)
    company = step_of(heads, [(1, 37), (1, 6000), (90, 4200)], seed=4, kv_dtype=kv_dtype)
    for begin, end in [(0, 64), (1, 66), (64, length), (99, 333), (5, 7), (62, 200), (length - 3, length)]:
        part = joined(cut_out(whole, [(begin, end)]), company)
        out = run(attention, part)[: end - begin]
        assert torch.equal(out, expected[begin:end]), (begin, end)


def cut_out(step: Step, spans: list[tuple[int, int]]) -> Step:
    """Queries begin .. end of request 0, as a chunk of its prompt."""
    (begin, end), r = spans[0], 0
    ones = step.q_lens[:1]
    return Step(ones * 0 + end - begin, ones * 0 + end, step.block_table[r : r + 1], step.q[begin:end], step.k, step.v)


def joined(one: Step, other: Step) -> Step:
    """A step of both; the other's pages lie behind the one's."""
    width = max(one.block_table.shape[1], other.block_table.shape[1])
    tables = [
        np.pad(t, ((0, 0), (0, width - t.shape[1])), constant_values=-1)
        for t in (one.block_table, np.where(other.block_table < 0, -1, other.block_table + len(one.k)))
    ]
    return Step(
        np.concatenate([one.q_lens, other.q_lens]),
        np.concatenate([one.seq_lens, other.seq_lens]),
        np.concatenate(tables).astype(np.int32),
        torch.cat([one.q, other.q]),
        torch.cat([as_moved(one.k), as_moved(other.k)]).view(one.k.dtype),
        torch.cat([as_moved(one.v), as_moved(other.v)]).view(one.v.dtype),
    )


@pytest.mark.parametrize("kv_dtype", KV_DTYPES, ids=str)
def test_torch_path_gives_the_same(kv_dtype):
    heads = (32, 4)
    attention = select_attention("torch", *heads, 128, 16, "cuda", kv_dtype=kv_dtype)
    step = step_of(heads, MIXED["decode and a chunk"], kv_dtype=kv_dtype)
    attention.plan(step.q_lens, step.seq_lens, step.block_table)
    assert_right(attention.attend(step.q, step.k, step.v), step)


def test_launch_errors_are_typed():
    attention = make((32, 4))
    step = step_of((32, 4), [(1, 10)])
    attention.plan(step.q_lens, step.seq_lens, step.block_table)
    assert attention._planned.short is not None
    attention._planned.short.num_items = -1  # a grid that no GPU takes
    with pytest.raises(KernelError, match="attention kernel: invalid"):
        attention.attend(step.q, step.k, step.v)
