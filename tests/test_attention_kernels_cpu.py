"""What can be promised of the attention tier's kernels without a GPU: references that equal the plain model, wrappers
that refuse what no kernel takes, and sources that compile for every architecture without spills."""

import math

import pytest
import torch
from compiling import compile_each, compile_for

from expertmesh.cluster.attention.model import _head_norm
from expertmesh.cluster.attention.rope import RotaryTable, rotate
from expertmesh.errors import KernelError
from expertmesh.kernels import attention_reference as reference
from expertmesh.kernels import jit, thin_linear
from expertmesh.kernels.add_norm import add_rms_norm, norm_threads
from expertmesh.kernels.combine_norm import combine_norm_kernel
from expertmesh.kernels.decode_attention import Share, decode_attention_kernel, share_for
from expertmesh.kernels.gate_linear import gate_linear_kernel
from expertmesh.kernels.kv_numbers import E4M3, as_moved, from_kv, to_kv
from expertmesh.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_kernel
from expertmesh.kernels.widen_kv import widen_kv
from expertmesh.model_config import RopeConfig
from expertmesh.numerics import rms_norm, silu_mul

BF16 = torch.bfloat16
EPS = 1e-6


pytestmark = pytest.mark.usefixtures("private_cubins")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


# ---------------------------------------------------------------------------------------------------------- references
def test_norm_reference_is_the_models_own():
    x, residual, weight = noise(5, 64), noise(5, 64, seed=1), noise(64, seed=2)
    total, normed = reference.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, rms_norm(total, weight, EPS))
    assert torch.equal(reference.add_rms_norm(None, residual, weight, EPS)[1], rms_norm(residual, weight, EPS))


@pytest.mark.parametrize("kv_dtype", [BF16, E4M3])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 16), (4, 4, 32), (16, 2, 128)])
def test_qk_norm_rope_reference_is_the_models_own(heads, kv_heads, head_dim, kv_dtype):
    num_tokens, block_size = 7, 4
    rotary = RotaryTable(RopeConfig(theta=10000.0), head_dim)
    positions = torch.tensor([0, 5, 1, 900, 2, 3, 1023])
    slots = torch.tensor([3, -1, 0, 11, 7, -1, 8])
    qkv = noise(num_tokens, (heads + 2 * kv_heads) * head_dim)
    qk_norm = noise(heads + kv_heads, head_dim, seed=1)
    rotary.rows(positions)
    cos, sin = rotary._cos, rotary._sin  # [P, D], the halves of cos equal, the first half of sin negated
    cos_sin = torch.cat([cos[:, : head_dim // 2], sin[:, head_dim // 2 :]], dim=1)
    caches = [torch.full((3, block_size, kv_heads, head_dim), 7.0).to(kv_dtype) for _ in range(2)]
    q = reference.qk_norm_rope(
        qkv, qk_norm, EPS, cos_sin, positions, slots, *caches, num_heads=heads, num_kv_heads=kv_heads
    )
    rows = qkv.view(num_tokens, heads + 2 * kv_heads, head_dim)
    qk = rotate(_head_norm(rows[:, : heads + kv_heads], qk_norm, EPS), *rotary.rows(positions))
    assert torch.equal(q, qk[:, :heads])
    expected = [torch.full((3 * block_size, kv_heads, head_dim), 7.0, dtype=BF16) for _ in range(2)]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[0][slot], expected[1][slot] = qk[token, heads:], rows[token, heads + kv_heads :]
    for cache, rows in zip(caches, expected):
        assert torch.equal(as_moved(cache).view(-1, kv_heads, head_dim), as_moved(to_kv(rows, kv_dtype)))


def test_kv_numbers_are_rounded_as_the_gpu_does_it():
    x = torch.tensor(
        [0.0, -0.0, 1.0, 1.0625, 1.1875, 2**-9, 2**-10, 1.5 * 2**-9, -447.0, 464.0, 1e30, -math.inf, math.nan]
    )
    stored = to_kv(x, E4M3)
    expected = [0.0, -0.0, 1.0, 1.0, 1.25, 2**-9, 0.0, 2 * 2**-9, -448.0, 448.0, 448.0, -448.0, math.nan]
    assert torch.equal(from_kv(stored, torch.float32).nan_to_num(7.0), torch.tensor(expected).nan_to_num(7.0))
    every = torch.arange(256, dtype=torch.uint8).view(E4M3)
    for dtype in (torch.float32, BF16):
        assert torch.equal(from_kv(every, dtype).nan_to_num(7.0), every.to(dtype).nan_to_num(7.0))
    again, is_nan = as_moved(to_kv(from_kv(every, BF16), E4M3)), every.float().isnan()
    assert torch.equal(again[~is_nan], as_moved(every)[~is_nan]), "nothing is lost"
    assert to_kv(x, BF16).dtype == BF16


def test_pages_are_widened_in_the_order_that_is_asked_for():
    caches = [to_kv(noise(6, 4, 2, 16, seed=seed), E4M3) for seed in (0, 1)]
    outs = [torch.full((5, 4, 2, 16), 7.0, dtype=BF16) for _ in range(2)]
    reference.widen_kv(*caches, torch.tensor([4, 0, 4], dtype=torch.int32), *outs)
    for cache, out in zip(caches, outs):
        assert torch.equal(out[:3], as_moved(cache)[[4, 0, 4]].view(E4M3).to(BF16))
        assert bool((out[3:] == 7.0).all())


def test_combine_norm_reference_is_the_weighted_sum_then_the_norm():
    y, weights = noise(4, 8, 64), torch.rand(4, 8, generator=torch.Generator().manual_seed(3))
    residual, weight = noise(4, 64, seed=1), noise(64, seed=2)
    ids = torch.zeros(4, 8, dtype=torch.int32)
    ids[1] = -1
    ids[2, 3] = -1
    y[1], y[2, 3] = float("nan"), float("inf")
    total, normed = reference.combine_add_rms_norm(y, weights, residual, weight, EPS, ids)
    assert torch.equal(total[1], residual[1])
    assert bool(normed.isfinite().all())
    whole, _ = reference.combine_add_rms_norm(y[:1], weights[:1], residual[:1], weight, EPS)
    sums = (y[:1].float() * weights[:1, :, None]).sum(1).to(BF16)
    assert torch.allclose(whole.float(), (residual[:1] + sums).float(), rtol=2**-7)


def test_silu_mul_reference_is_the_models_own():
    gate_up = noise(3, 256)
    assert torch.equal(reference.silu_mul(gate_up), silu_mul(gate_up))


def test_embedding_reads_the_last_token_of_a_slot_for_negative_ids():
    table, last_token = noise(10, 64), torch.tensor([4, 9, 2])
    rows, normed = reference.embed_rms_norm(table, torch.tensor([7, -2, -1]), last_token, noise(64, seed=1), EPS)
    assert torch.equal(rows, table[[7, 9, 4]])
    assert torch.equal(normed, rms_norm(rows, noise(64, seed=1), EPS))


# ------------------------------------------------------------------------------------------------------------ wrappers
def test_wrappers_say_what_they_want():
    with pytest.raises(KernelError, match="on a GPU"):
        add_rms_norm(None, noise(2, 64), noise(64), EPS)
    with pytest.raises(KernelError, match="multiple of 8"):
        norm_threads(100)
    one = torch.zeros(1, dtype=torch.int64)
    cache = noise(1, 1, 1, 24)
    with pytest.raises(KernelError, match="pages must be contiguous"):
        widen_kv(noise(1, 1, 1, 16), noise(1, 1, 1, 16), one.int(), noise(1, 1, 1, 16), noise(1, 1, 1, 16))
    with pytest.raises(KernelError, match="head_dim must be"):
        qk_norm_rope(
            noise(1, 72), noise(2, 24), EPS, torch.zeros(1, 24), one, one, cache, cache, num_heads=1, num_kv_heads=1
        )


# --------------------------------------------------------------------------------------------------------- compilation
def heads(num_heads, num_kv_heads, head_dim, per_group, kv_fp8=False):
    return qk_norm_rope_kernel(num_heads, num_kv_heads, head_dim, per_group, kv_fp8).defines


@pytest.mark.parametrize(
    ("file", "defines"),
    [
        ("add_norm.cu", {"HIDDEN": 2048, "THREADS": 256}),
        ("add_norm.cu", {"HIDDEN": 12288, "THREADS": 1024}),
        ("qk_norm_rope.cu", heads(64, 4, 128, 4)),
        ("qk_norm_rope.cu", heads(16, 2, 64, 4)),
        ("qk_norm_rope.cu", heads(64, 4, 128, 4, kv_fp8=True)),
        ("qk_norm_rope.cu", heads(32, 4, 128, 1, kv_fp8=True)),
        ("widen_kv.cu", {"PAGE": 8192}),
        ("combine_norm.cu", {"HIDDEN": 2048, "THREADS": 256, "TOP_K": 8}),
        ("combine_norm.cu", {"HIDDEN": 6144, "THREADS": 768, "TOP_K": 3}),
        ("silu_mul.cu", {}),
        ("embed_norm.cu", {"HIDDEN": 2048, "THREADS": 256}),
        ("sample.cu", {"LOGITS_F32": 0, "ALIGNED": 1}),
        ("thin_linear.cu", {"K": 2048, "WARPS": 8}),
        ("thin_linear.cu", {"K": 4096, "WARPS": 16}),
    ],
)
def test_kernels_compile_without_spills(file, defines):
    for compiled in compile_for(jit.SUPPORTED_ARCHS, file, defines):
        assert compiled.use()
        assert all(u.clean for u in compiled.use()), (compiled.key, compiled.use())


@pytest.mark.parametrize(
    "kernels",
    [
        [gate_linear_kernel(hidden, experts, 8, True) for hidden, experts in ((2048, 128), (4096, 128), (128, 32))],
        [
            decode_attention_kernel(32, 4, 128, 16, share_for(1, 4)),
            *(decode_attention_kernel(64, 4, 128, 16, share_for(tokens, 4)) for tokens in (1, 4, 8, 32, 64)),
            decode_attention_kernel(40, 8, 128, 16, Share(4, 4, 2)),
            decode_attention_kernel(4, 2, 64, 4, share_for(1, 2)),
            decode_attention_kernel(16, 16, 64, 4, share_for(32, 16)),
            decode_attention_kernel(32, 4, 128, 16, share_for(1, 4, 1), 1),
            decode_attention_kernel(64, 4, 128, 16, share_for(8, 4, 1), 1),
            decode_attention_kernel(4, 2, 64, 16, share_for(32, 2, 1), 1),
            decode_attention_kernel(64, 4, 128, 16, share_for(64, 4, 1), 1),
        ],
        [combine_norm_kernel(hidden, 8, 8) for hidden in (2048, 4096)],
    ],
    ids=["the gate", "attention for few decodes", "a row of few"],
)
def test_what_a_cluster_shares_compiles_where_there_are_clusters(kernels):
    for compiled in compile_each((k.file, arch, k.defines) for k in kernels for arch in ("sm_90a", "sm_100a")):
        assert compiled.use()
        assert all(u.clean for u in compiled.use()), (compiled.key, compiled.use())


def test_thin_products_name_the_sizes_they_take():
    assert all(thin_linear.takes(n, k) for n, k in ((5120, 2048), (2048, 4096), (151936, 2048), (8, 64)))
    assert not any(thin_linear.takes(n, k) for n, k in ((4096, 8192), (12, 64), (64, 48), (0, 64)))
    assert [thin_linear.warps_for(k) for k in (64, 512, 1024, 2048, 2560, 4096)] == [2, 2, 4, 8, 16, 16]


def test_sampler_compiles_for_float32_and_odd_rows_without_spills():
    use = jit.compile_only("sample.cu", "sm_90a", {"LOGITS_F32": 1, "ALIGNED": 0}).use()
    assert {u.name for u in use} == {"sample_scan", "sample_choose", "sample_admit", "sample_uniforms"}
    assert all(u.clean for u in use), use
