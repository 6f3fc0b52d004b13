"""The attention tier's kernels on a GPU: every ugly shape against plain torch, rows that do not see each other, and the
same bits from a captured graph."""

import math

import pytest
import torch

from expertmesh.errors import KernelError
from expertmesh.kernels import attention_reference as reference
from expertmesh.kernels import qk_norm_rope as qk_norm_rope_module
from expertmesh.kernels.add_norm import add_rms_norm
from expertmesh.kernels.combine import combine
from expertmesh.kernels.combine_norm import combine_add_rms_norm
from expertmesh.kernels.embed_norm import embed_rms_norm
from expertmesh.kernels.gate_linear import gate_linear
from expertmesh.kernels.gate_topk import gate_topk
from expertmesh.kernels.jit import Kernel
from expertmesh.kernels.kv_numbers import E4M3, as_moved, from_kv, to_kv
from expertmesh.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_kernel
from expertmesh.kernels.silu_mul import silu_mul
from expertmesh.kernels.thin_linear import thin_linear
from expertmesh.kernels.widen_kv import widen_kv

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
DEVICE = "cuda"
BF16 = torch.bfloat16
EPS = 1e-6
TOKENS = (0, 1, 2, 3, 17, 257)
HIDDEN = (64, 2048, 4096, 6144, 12288)
HEADS = ((32, 4, 128), (64, 4, 128), (16, 2, 64), (4, 2, 32), (8, 1, 256), (2, 2, 16))
NAN = float("nan")


def noise(*shape, seed=0, scale=1.0):
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    return (torch.randn(shape, device=DEVICE, generator=generator) * scale).to(BF16)


def assert_rounded_alike(got, expected):
    """Nearly everywhere equal, elsewhere at most two units of bf16's last place apart: a sum may be in another order.

    Why two: each of these rounds a value, multiplies it and rounds again. A first value of 1.0 may come out as 1.0078,
    a unit; times 1.41 that is 1.41 units, which the second rounding may make two: 2 * 2^-7 of the result."""
    assert got.shape == expected.shape
    torch.testing.assert_close(got.float(), expected.float(), rtol=2**-6, atol=1e-30, equal_nan=True)
    same = (got == expected) | (got.isnan() & expected.isnan())
    assert int((~same).sum()) <= 4 + 0.02 * got.numel()


# ---------------------------------------------------------------------------------------------------- sums and norms
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("with_x", [True, False])
def test_add_norm_equals_plain_torch(num_tokens, hidden, with_x):
    x = noise(num_tokens, hidden) if with_x else None
    residual, weight = noise(num_tokens, hidden, seed=1, scale=3), noise(hidden, seed=2)
    expected_residual, expected = reference.add_rms_norm(x, residual, weight, EPS)
    got = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual, expected_residual)
    assert_rounded_alike(got, expected)


def test_add_norm_may_write_over_x():
    x, residual, weight = noise(5, 2048), noise(5, 2048, seed=1), noise(2048, seed=2)
    expected = add_rms_norm(x, residual.clone(), weight, EPS)
    out = add_rms_norm(x, residual, weight, EPS, out=x)
    assert out.data_ptr() == x.data_ptr()
    assert torch.equal(out, expected)


def test_norm_rows_do_not_see_each_other():
    x, residual, weight = noise(33, 2048), noise(33, 2048, seed=1), noise(2048, seed=2)
    whole_residual = residual.clone()
    whole = add_rms_norm(x, whole_residual, weight, EPS)
    for row in (0, 7, 32):
        alone_residual = residual[row : row + 1].clone()
        assert torch.equal(add_rms_norm(x[row : row + 1], alone_residual, weight, EPS), whole[row : row + 1])
        assert torch.equal(alone_residual, whole_residual[row : row + 1])
    x[3] = NAN
    spoilt_residual = residual.clone()
    spoilt = add_rms_norm(x, spoilt_residual, weight, EPS)
    others = [i for i in range(33) if i != 3]
    assert bool(spoilt[3].isnan().all())
    assert torch.equal(spoilt[others], whole[others])
    assert torch.equal(spoilt_residual[others], whole_residual[others])


@pytest.mark.parametrize(("hidden", "top_k"), [(2048, 8), (4096, 8), (64, 1), (6144, 3), (12288, 8)])
@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("with_ids", [True, False])
def test_combine_norm_is_combine_then_add_norm_bit_for_bit(num_tokens, hidden, top_k, with_ids):
    y = noise(num_tokens, top_k, hidden)
    weights = torch.rand(num_tokens, top_k, device=DEVICE)
    residual, weight = noise(num_tokens, hidden, seed=1), noise(hidden, seed=2)
    ids = torch.zeros(num_tokens, top_k, dtype=torch.int32, device=DEVICE)
    if with_ids and num_tokens:
        ids[torch.rand(num_tokens, top_k, device=DEVICE) < 0.3] = -1
        ids[-1] = -1
        y[ids < 0] = NAN
    expected_residual = residual.clone()
    expected = add_rms_norm(combine(y, ids, weights), expected_residual, weight, EPS)
    got = combine_add_rms_norm(y, weights, residual, weight, EPS, ids=ids if with_ids else None)
    assert torch.equal(got, expected)
    assert torch.equal(residual, expected_residual)
    assert not got.isnan().any()


@pytest.mark.parametrize("width", [8, 64, 768, 6144])
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_silu_mul_equals_plain_torch(num_tokens, width):
    gate_up = noise(num_tokens, 2 * width, scale=4)
    if num_tokens:
        gate_up[0, :4] = torch.tensor([NAN, -200.0, 200.0, 0.0], device=DEVICE).to(BF16)
    assert_rounded_alike(silu_mul(gate_up), reference.silu_mul(gate_up))


@pytest.mark.parametrize("num_tokens", TOKENS)
def test_embedding_reads_known_ids_and_last_tokens(num_tokens):
    table, weight = noise(1000, 2048), noise(2048, seed=1)
    last_token = torch.randint(0, 1000, (40,), device=DEVICE)
    ids = torch.randint(-40, 1000, (num_tokens,), device=DEVICE)
    expected = reference.embed_rms_norm(table, ids, last_token, weight, EPS)
    got = embed_rms_norm(table, ids, weight, EPS, last_token=last_token)
    assert torch.equal(got[0], expected[0])
    assert_rounded_alike(got[1], expected[1])


def test_an_id_outside_the_vocabulary_becomes_nan_and_no_other_row_does():
    table, weight = noise(10, 64), noise(64, seed=1)
    ids = torch.tensor([3, 10, -1, 9], device=DEVICE)
    rows, normed = embed_rms_norm(table, ids, weight, EPS)  # without last_token a negative id is outside too
    assert rows.isnan().all(1).tolist() == [False, True, True, False]
    assert normed.isnan().all(1).tolist() == [False, True, True, False]


# -------------------------------------------------------------------------------------------------------------- heads
def head_inputs(num_tokens, heads, kv_heads, head_dim, seed=0):
    block_size, num_blocks = 16, -(-num_tokens // 16) + 2
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 5000, (num_tokens,), generator=generator)
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens]
    slots[1::5] = -1
    angles = torch.arange(5000)[:, None] * 10000.0 ** -(torch.arange(head_dim // 2) / (head_dim // 2))
    return {
        "qkv": noise(num_tokens, (heads + 2 * kv_heads) * head_dim, seed=seed, scale=2),
        "qk_norm": noise(heads + kv_heads, head_dim, seed=seed + 1),
        "cos_sin": torch.cat([angles.cos(), angles.sin()], 1).float().to(DEVICE),
        "positions": positions.to(DEVICE),
        "slot_mapping": slots.to(DEVICE),
        "caches": [torch.full((num_blocks, block_size, kv_heads, head_dim), 7.0, dtype=BF16, device=DEVICE)] * 2,
        "sizes": {"num_heads": heads, "num_kv_heads": kv_heads},
    }


def run_heads(function, given):
    caches = [c.clone() for c in given["caches"]]
    arguments = [given[name] for name in ("cos_sin", "positions", "slot_mapping")]
    return function(given["qkv"], given["qk_norm"], EPS, *arguments, *caches, **given["sizes"]), *caches


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("num_tokens", [*TOKENS, 600])
def test_fp8_kv_is_the_rounding_of_bf16_kv(num_tokens, heads, kv_heads, head_dim):
    given = head_inputs(num_tokens, heads, kv_heads, head_dim)
    given["qkv"][:1, -8:] = torch.tensor([500, -1e30, math.inf, -math.inf, NAN, 0.002, -0.001, 0.0])  # of v
    q, k, v = run_heads(qk_norm_rope, given)
    in_fp8 = given | {"caches": [to_kv(cache, E4M3) for cache in given["caches"]]}
    q8, k8, v8 = run_heads(qk_norm_rope, in_fp8)
    assert torch.equal(q8, q)
    assert torch.equal(as_moved(k8), as_moved(to_kv(k, E4M3)))
    assert torch.equal(as_moved(v8) & 0x7F, as_moved(to_kv(v, E4M3)) & 0x7F)  # NaN has a sign
    assert torch.equal(from_kv(v8, BF16).nan_to_num(7), from_kv(to_kv(v, E4M3), BF16).nan_to_num(7))


def test_e4m3_without_the_instruction_is_the_same(monkeypatch):
    given = head_inputs(600, 32, 4, 128)
    given["qkv"][:, -128:] *= torch.logspace(-12, 12, 600, base=2, device=DEVICE)[:, None].to(BF16)
    given["caches"] = [to_kv(cache, E4M3) for cache in given["caches"]]
    hard = run_heads(qk_norm_rope, given)
    kernel = qk_norm_rope_kernel(32, 4, 128, 4, True)
    soft = Kernel(kernel.file, kernel.name, kernel.defines | {"SOFT_E4M3": 1})
    monkeypatch.setattr(qk_norm_rope_module, "qk_norm_rope_kernel", lambda *sizes: soft)
    for a, b in zip(hard, run_heads(qk_norm_rope, given)):
        assert torch.equal(as_moved(a), as_moved(b))


@pytest.mark.parametrize("page", [(16, 4, 128), (16, 2, 64), (1, 1, 16), (32, 8, 128)])
def test_pages_are_widened_exactly(page):
    every = torch.arange(256, dtype=torch.uint8)
    every[every & 0x7F == 0x7F] = 0  # NaN is in no page that is read
    order = torch.randint(256, (2, 50, *page), generator=torch.Generator().manual_seed(0))
    k, v = every[order].view(E4M3).to(DEVICE)
    pages = torch.tensor([7, 0, 49, 7, 13], dtype=torch.int32, device=DEVICE)
    outs = torch.full((2, 2, 6, *page), 7.0, dtype=BF16, device=DEVICE)
    widen_kv(k, v, pages, *outs[0])
    reference.widen_kv(k, v, pages, *outs[1])
    assert torch.equal(outs[0], outs[1])
    assert bool((outs[0, :, 5] == 7.0).all())
    widen_kv(k, v, pages[:0], *outs[0])


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize("num_tokens", [*TOKENS, 600])
def test_qk_norm_rope_equals_plain_torch(num_tokens, heads, kv_heads, head_dim):
    given = head_inputs(num_tokens, heads, kv_heads, head_dim)
    q, k, v = run_heads(qk_norm_rope, given)
    expected_q, expected_k, expected_v = run_heads(reference.qk_norm_rope, given)
    assert q.shape == (num_tokens, heads, head_dim)
    torch.testing.assert_close(q.float(), expected_q.float(), rtol=2**-6, atol=2e-2)
    torch.testing.assert_close(k.float(), expected_k.float(), rtol=2**-6, atol=2e-2)
    assert int((q != expected_q).sum() + (k != expected_k).sum()) <= 4 + 0.01 * q.numel()
    assert torch.equal(v, expected_v)  # written as it is, and nothing beside


def test_heads_of_a_token_do_not_depend_on_other_tokens():
    given = head_inputs(600, 32, 4, 128)
    whole = run_heads(qk_norm_rope, given)
    given["qkv"][100] = NAN
    spoilt = run_heads(qk_norm_rope, given)
    others = [t for t in range(600) if t != 100]
    assert torch.equal(spoilt[0][others], whole[0][others])
    few = dict(given)
    for name in ("qkv", "positions", "slot_mapping"):
        few[name] = given[name][5:8].contiguous()
    q, k, v = run_heads(qk_norm_rope, few)  # one head a group of lanes here, four above: the same bits
    assert torch.equal(q, whole[0][5:8])
    for cache, all_of_them in ((k, whole[1]), (v, whole[2])):
        for slot in given["slot_mapping"][5:8].tolist():
            if slot >= 0:
                assert torch.equal(cache.flatten(0, 1)[slot], all_of_them.flatten(0, 1)[slot])


# ------------------------------------------------------------------------------------------------------ thin products
@pytest.mark.parametrize(
    ("num_outputs", "k"),
    [(5120, 2048), (2048, 4096), (8, 64), (1000, 96), (264, 2560), (2112, 128), (151936, 2048)],
)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 7, 8])
def test_thin_linear_equals_the_product(num_rows, num_outputs, k):
    x, w = noise(num_rows, k), noise(num_outputs, k, seed=1, scale=0.05)
    got = thin_linear(x, w)
    assert got.shape == (num_rows, num_outputs)
    if num_outputs > 10000:  # float64 of the head is 2.5 GB
        assert torch.equal(got[:, -800:], thin_linear(x, w[-800:].contiguous()))
        w, got = w[:3000], got[:, :3000]
    exact = x.double() @ w.double().t()
    assert not got.isnan().any()
    assert num_rows == 0 or float((got.double() - exact).norm() / exact.norm()) < 3e-3
    torch.testing.assert_close(got.double(), exact, rtol=2**-7, atol=1e-2)


def test_a_thin_product_row_does_not_depend_on_the_others():
    x, w = noise(8, 2048), noise(5120, 2048, seed=1)
    whole = thin_linear(x, w)
    for row in (0, 3, 7):
        assert torch.equal(thin_linear(x[row : row + 1], w), whole[row : row + 1])
    assert torch.equal(thin_linear(x[3:6], w), whole[3:6])
    x[2] = NAN
    others = [0, 1, 3, 4, 5, 6, 7]
    spoilt = thin_linear(x, w)
    assert torch.equal(spoilt[others], whole[others])
    assert bool(spoilt[2].isnan().all())


GATES = ((128, 2048, 8), (128, 4096, 8), (160, 2560, 8), (32, 128, 8), (8, 64, 1), (512, 1024, 10))


@pytest.mark.parametrize(("num_experts", "hidden", "top_k"), GATES)
@pytest.mark.parametrize("num_tokens", TOKENS)
def test_gate_linear_chooses_as_the_gate_of_its_logits(num_tokens, num_experts, hidden, top_k):
    x, gate = noise(num_tokens, hidden), noise(num_experts, hidden, seed=1, scale=0.05)
    ids, weights = gate_linear(x, gate, top_k)
    logits = torch.cat([thin_linear(rows, gate) for rows in x.split(8)]) if num_tokens else noise(0, num_experts)
    expected_ids, expected_weights = gate_topk(logits, top_k)  # the same logits, bit for bit
    assert torch.equal(ids, expected_ids)
    assert torch.equal(weights, expected_weights)


def test_gate_linear_ties_padding_counts_and_nan():
    gate = noise(128, 2048, seed=1, scale=0.05)
    gate[64:] = gate[:64]  # every logit twice
    x = noise(40, 2048)
    x[7] = NAN
    x[8, 3] = float("inf")
    counts = torch.zeros(128, dtype=torch.int32, device=DEVICE)
    rows = torch.arange(40, device=DEVICE)
    rows[[5, 39]] = -1
    ids, weights = gate_linear(x, gate, 8, rows=rows, counts=counts)
    whole_ids, whole_weights = gate_linear(noise(40, 2048), gate, 8)
    nowhere = [5, 7, 8, 39]
    assert bool((ids[nowhere] == -1).all())
    assert bool(weights[[7, 8]].isnan().all())
    others = [i for i in range(40) if i not in nowhere]
    assert torch.equal(ids[others], whole_ids[others])
    assert torch.equal(weights[others], whole_weights[others])
    falling, equal = weights[others, :-1] > weights[others, 1:], weights[others, :-1] == weights[others, 1:]
    assert bool((falling | (equal & (ids[others, :-1] < ids[others, 1:]))).all())  # the lower of equals comes first
    assert bool(equal[:, ::2].all())
    assert torch.equal(counts, torch.bincount(ids[ids >= 0].flatten(), minlength=128).int())
    plain_weights = gate_linear(x[:1], gate, 8, renormalize=False)[1]
    assert torch.allclose(plain_weights / plain_weights.sum(), weights[:1])


# ------------------------------------------------------------------------------------------------------------- graphs
def test_a_captured_layer_gives_the_bits_of_an_eager_one():
    num_tokens, hidden, heads, kv_heads, head_dim = 3, 2048, 32, 4, 128
    given = head_inputs(num_tokens, heads, kv_heads, head_dim)
    table, weight = noise(100, hidden), noise(hidden, seed=1)
    gate = noise(128, hidden, seed=4)
    y, topk_weights = noise(num_tokens, 8, hidden, seed=2), torch.rand(num_tokens, 8, device=DEVICE)
    last_token = torch.tensor([5, 6, 7], device=DEVICE)
    ids = torch.tensor([-1, 8, -3], device=DEVICE)
    caches = [c.clone() for c in given["caches"]]

    def layer():
        residual, normed = embed_rms_norm(table, ids, weight, EPS, last_token=last_token)
        normed = add_rms_norm(normed, residual, weight, EPS)
        normed = combine_add_rms_norm(y, topk_weights, residual, weight, EPS)
        arguments = [given[name] for name in ("cos_sin", "positions", "slot_mapping")]
        q = qk_norm_rope(given["qkv"], given["qk_norm"], EPS, *arguments, *caches, **given["sizes"])
        gate_ids, gate_weights = gate_linear(normed, gate, 8)
        product = thin_linear(normed, gate)
        return residual, normed, q, silu_mul(normed), gate_ids, gate_weights, product, *caches

    expected = [t.clone() for t in layer()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = layer()
    for _ in range(3):
        for tensor in made:
            tensor.fill_(0)
        graph.replay()
        for tensor, wanted in zip(made[:7], expected):
            assert torch.equal(tensor, wanted)
        written = given["slot_mapping"][given["slot_mapping"] >= 0]
        for tensor, wanted in zip(made[7:], expected[7:]):
            assert torch.equal(tensor.flatten(0, 1)[written], wanted.flatten(0, 1)[written])


def test_what_no_kernel_takes_is_refused():
    with pytest.raises(KernelError, match="contiguous"):
        add_rms_norm(None, noise(64, 4).t(), noise(64), EPS)
    with pytest.raises(KernelError, match="float32"):
        combine_add_rms_norm(noise(1, 8, 64), noise(1, 8), noise(1, 64), noise(64), EPS)
    with pytest.raises(KernelError, match="multiple of 8"):
        silu_mul(noise(1, 20))
