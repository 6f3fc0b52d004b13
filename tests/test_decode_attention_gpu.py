"""Attention for few decodes on a GPU: every ugly length against float64, the cache bit for bit `qk_norm_rope`'s, graphs
that are replayed for other lengths, and pages that are read before the kernel before has ended."""

import numpy as np
import pytest
import torch
from decode_world import EPS, DecodeStep, assert_heads, decode_step

from expertmesh.cluster.attention import flash
from expertmesh.cluster.attention.flash import FlashAttention
from expertmesh.errors import KernelError
from expertmesh.kernels.decode_attention import Share, decode_attention, share_for, takes
from expertmesh.kernels.qk_norm_rope import Projected, qk_norm_rope
from expertmesh.kernels.thin_linear import thin_linear

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
DEVICE, BF16, E4M3 = "cuda", torch.bfloat16, torch.float8_e4m3fn
SHAPES = [(32, 4, 128), (64, 4, 128), (4, 2, 64), (40, 8, 128), (16, 16, 64)]
if not takes(32, 4, 128, torch.device(DEVICE)):
    pytest.skip("needs clusters", allow_module_level=True)
LENGTHS = [[1, 2, 15, 16, 17, 63, 64, 65], [200, 511, 512, 513, 0, 0], [2000, 4097, 129], [1], [192, 0], [9000]]
MANY = [*range(1, 60), 1024, 1023, 0, 513, *[0] * 5]  # more clusters than multiprocessors


def run(step: DecodeStep, **how) -> torch.Tensor:
    arguments = [a for a in step.arguments() if a is not step.out]
    *first, scale = arguments
    heads = {"num_heads": step.num_heads, "num_kv_heads": step.num_kv_heads}
    return decode_attention(*first, scale=scale, out=step.out, **heads, **how)


def name(lengths: list[int]) -> str:
    return str(lengths) if len(lengths) < 10 else f"{len(lengths)} requests"


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16 if x.dtype == BF16 else torch.uint8)


def assert_whole_step(step: DecodeStep) -> None:
    """Heads as float64 has them of the queries that `qk_norm_rope` makes; the caches bit for bit as it leaves them."""
    assert_heads(step, step.heads(step.queries(qk_norm_rope)))
    assert torch.equal(bits(step.k), bits(step.expected_k))
    assert torch.equal(bits(step.v), bits(step.expected_v))


@pytest.mark.parametrize("lengths", [*LENGTHS, MANY], ids=name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_length_gives_the_references_heads_and_the_same_cache(shape, lengths):
    step = decode_step(lengths, *shape, device=DEVICE)
    run(step)
    assert_whole_step(step)


@pytest.mark.parametrize("lengths", [*LENGTHS, MANY], ids=name)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_e4m3_caches_are_widened_and_written_as_by_the_other_launch(shape, lengths):
    step = decode_step(lengths, *shape, device=DEVICE, kv_dtype=E4M3)
    run(step)
    assert_whole_step(step)


@pytest.mark.parametrize(
    "how", [(8, 4, 4), (4, 8, 2), (2, 8, 2), (2, 4, 2), (1, 4, 2), (8, 8, 2), (4, 4, 2), (1, 8, 3), (8, 2, 6)], ids=str
)
@pytest.mark.parametrize("block_size", [4, 16, 64])
def test_any_share_of_ctas_warps_and_units(how, block_size):
    for lengths in LENGTHS[:3]:
        step = decode_step(lengths, 32, 4, 128, device=DEVICE, block_size=block_size)
        run(step, share=Share(*how))
        assert_whole_step(step)


def test_what_no_kernel_takes_is_refused():
    with pytest.raises(KernelError, match="head sizes"):
        run(decode_step([5], 4, 2, 32, device=DEVICE))
    with pytest.raises(KernelError, match="up to 16 heads"):
        run(decode_step([5], 32, 1, 64, device=DEVICE))


def test_a_request_sees_no_other_and_repeats_its_bits():
    """Among the steps of one share: a bucket of another size may have another one, which adds up in another order."""
    step = decode_step([300, 17, 0, 2000], 32, 4, 128, device=DEVICE)
    first = run(step).clone()
    for _ in range(100):
        step.out.fill_(torch.nan)
        assert torch.equal(run(step), first)
    alone = decode_step([2000], 32, 4, 128, device=DEVICE)
    alone.qkv, alone.cos_sin, alone.qk_norm = step.qkv[3:].contiguous(), step.cos_sin, step.qk_norm
    for mine, theirs in ((alone.k, step.expected_k), (alone.v, step.expected_v)):
        mine[alone.pages_of(0)] = theirs[step.pages_of(3)]
    assert torch.equal(run(alone, share=share_for(4, 4))[0], first[3])


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_a_captured_launch_is_replayed_for_other_lengths(shape):
    """The step's arrays lie at fixed addresses; whatever was there at capture means nothing."""
    steps = [decode_step(lengths, *shape, device=DEVICE, width=300, seed=i) for i, lengths in enumerate(
        ([64, 1, 700], [1, 0, 0], [4097, 3, 16], [65, 130, 0])
    )]  # fmt: skip
    most = max(len(step.k) for step in steps)
    fixed = decode_step([1, 1, 1], *shape, device=DEVICE, width=300)
    fixed.k, fixed.v = (torch.zeros(most, *steps[0].k.shape[1:], dtype=BF16, device=DEVICE) for _ in range(2))
    fixed.cos_sin = max((step.cos_sin for step in steps), key=len).clone()
    run(fixed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(fixed)
    for step in steps:
        for name in ("qkv", "qk_norm", "positions", "slots", "kv_lens", "page_starts", "pages"):
            getattr(fixed, name).copy_(getattr(step, name))
        for cache, theirs in ((fixed.k, step.k), (fixed.v, step.v)):
            cache[: len(theirs)] = theirs
        step.cos_sin = fixed.cos_sin
        graph.replay()
        step.out, step.k, step.v = fixed.out, fixed.k[: len(step.k)], fixed.v[: len(step.v)]
        assert_whole_step(step)


def test_steps_read_what_earlier_steps_wrote_however_early_they_start():
    """A token's k and v of one step are read by the next before the kernel before it has ended: products stand around
    the launch, and a copy between steps, as in the engine."""
    num_heads, num_kv_heads, head_dim, num_tokens, hidden = 32, 4, 128, 2, 2048
    width, num_layers, num_steps = 8, 4, 100
    generator = torch.Generator(DEVICE).manual_seed(0)
    weights = [
        (torch.randn(shape, device=DEVICE, generator=generator) * 0.02).to(BF16)
        for _ in range(num_layers)
        for shape in (((num_heads + 2 * num_kv_heads) * head_dim, hidden), (hidden, num_heads * head_dim))
    ]
    x = torch.randn(num_tokens, hidden, device=DEVICE, generator=generator).to(BF16)
    qk_norm = torch.randn(num_heads + num_kv_heads, head_dim, device=DEVICE, generator=generator).to(BF16)
    cos_sin = torch.rand(256, head_dim, device=DEVICE, generator=generator)
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    attention = FlashAttention(num_heads, num_kv_heads, head_dim, 16, DEVICE, max_num_reqs=8, max_num_blocks=width)
    table = np.arange(num_tokens * width, dtype=np.int32).reshape(num_tokens, width)
    pages = torch.from_numpy(table.flatten()).to(DEVICE)
    starts = torch.arange(num_tokens, dtype=torch.int32, device=DEVICE) * width
    shape = (num_layers, 2, num_tokens * width, 16, num_kv_heads, head_dim)
    caches = [torch.full(shape, torch.nan, dtype=BF16, device=DEVICE) for _ in range(2)]
    inputs = torch.zeros(2, num_tokens, dtype=torch.int64, device=DEVICE)
    lens = torch.zeros(num_tokens, dtype=torch.int32, device=DEVICE)

    def forward(caches, one: bool):
        y = x
        for layer in range(num_layers):
            projected = Projected(thin_linear(y, weights[2 * layer]), qk_norm, EPS, cos_sin, *inputs)
            if one:
                mixed = decode_attention(*projected, *caches[layer], lens, starts, pages, **heads)
            else:
                mixed = attention.attend(qk_norm_rope(*projected, *caches[layer], **heads), *caches[layer])
            y = thin_linear(mixed.view(num_tokens, -1), weights[2 * layer + 1])
        return y

    def send(length: int):
        positions = torch.full((num_tokens,), length - 1)
        slots = torch.from_numpy(table[:, (length - 1) // 16].astype(np.int64)) * 16 + (length - 1) % 16
        inputs.copy_(torch.stack([positions, slots]).pin_memory(), non_blocking=True)
        lens.copy_(torch.full((num_tokens,), length, dtype=torch.int32).pin_memory(), non_blocking=True)
        lengths = np.full(num_tokens, length, np.int32)
        attention.plan(np.ones(num_tokens, np.int32), lengths, table, bucket=num_tokens, form="short")

    send(1)
    forward(caches[0].clone(), True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = forward(caches[0], True)
    results = []
    for step in range(num_steps):  # nothing waits for the host between steps
        send(step + 1)
        graph.replay()
        results.append(got.clone())
    for step in range(num_steps):
        send(step + 1)
        expected = forward(caches[1], False)
        assert float((results[step].float() - expected.float()).norm() / expected.float().norm()) < 3e-2
    first = caches[0][0].flatten(1, 2), caches[1][0].flatten(1, 2)  # of layer 0: the same k and v
    assert torch.equal(bits(first[0]), bits(first[1]))


# ----------------------------------------------------------------------------------------------------------- the plan
def test_a_plan_takes_the_launch_up_to_its_limits_and_the_other_forms_beyond(monkeypatch):
    monkeypatch.setattr(flash, "FEW_REQUESTS", 8)
    monkeypatch.setattr(flash, "FEW_TOKENS", 512)
    attention = FlashAttention(32, 4, 128, 16, DEVICE, max_num_reqs=16, max_num_blocks=64)
    assert "few" in attention.forms(8)
    assert "few" not in attention.forms(9)
    step = decode_step([200, 512, 1], 32, 4, 128, device=DEVICE, width=64)
    attention.load(step.k.clone(), step.v.clone())
    table = step.pages.view(3, 64).clamp(max=len(step.k) - 1).cpu().numpy()
    ones, lens = np.ones(3, np.int32), np.array(step.lengths, np.int32)
    key = attention.plan(ones, lens, table, bucket=4)
    assert key[1] == "few"
    assert attention.whole is not None
    padded = Projected(
        torch.cat([step.qkv, step.qkv[:1]]),
        *(step.qk_norm, EPS, step.cos_sin),
        *(torch.cat([x, x.new_full((1,), rest)]) for x, rest in ((step.positions, 0), (step.slots, -1))),
    )
    out = attention.whole(padded, step.k, step.v)
    assert not out[3].any()
    step.out = out[:3]
    assert_whole_step(step)
    for lengths, bucket, form in (([200, 513, 1], 4, None), ([200, 512, 1], 16, None), ([200, 512, 1], 4, "short")):
        assert attention.plan(ones, np.array(lengths, np.int32), table, bucket=bucket, form=form)[1] != "few"
        assert attention.whole is None
    attention.plan(ones, lens, table)
    assert attention.whole is None
    for options, has_few in (({"invariant": True}, False), ({"kv_dtype": E4M3}, True)):
        other = FlashAttention(32, 4, 128, 16, DEVICE, max_num_reqs=16, max_num_blocks=64, **options)
        assert (other.plan(ones, lens, table, bucket=4)[1] == "few") == has_few
