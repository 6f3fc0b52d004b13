"""The ugly shapes in few calls, for compute-sanitizer (`make sanitize-gpu`), which slows every access down.

Every tensor should be an allocation of its own there (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that a read past its end is
seen. Values are checked by the other tests; here a call must only be clean, and finite where something is local."""

import functools
import os

import pytest
import torch
from decode_world import decode_step

from expertmesh.kernels import jit, reference
from expertmesh.kernels.combine_norm import combine_add_rms_norm
from expertmesh.kernels.decode_attention import decode_attention
from expertmesh.kernels.decode_attention import takes as takes_decodes
from expertmesh.kernels.dense_fp8 import dense_fp8, pack_fp8
from expertmesh.kernels.dense_w8a8 import dense_w8a8, has_kernel
from expertmesh.kernels.dense_w8a8_few import dense_w8a8_few
from expertmesh.kernels.expert_layer import ExpertLayer
from expertmesh.kernels.expert_work import ExpertWork
from expertmesh.kernels.gate_linear import gate_linear, takes
from expertmesh.kernels.gate_topk import gate_topk
from expertmesh.kernels.pack_int4 import random_int4
from expertmesh.kernels.plan import all_plans

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
DEVICE = "cuda"
if "RACECHECK" in os.environ:  # it follows a barrier only from the threads that arrived on it themselves
    jit.set_debug(EVERY_LANE_ARRIVES=1)
TOP_K, NUM_LOCAL = 8, 5
SIZES = {"fp8_wide": (1024, 768)}  # rows-wide plans need tiles longer than their ring; all others: 256, 128


def shapes():
    """name -> ids [num_rows, top_k]"""
    generator = torch.Generator().manual_seed(0)
    any_ids = torch.randint(-1, NUM_LOCAL + 1, (70, TOP_K), generator=generator, dtype=torch.int32)
    one = torch.full((133, TOP_K), -1, dtype=torch.int32)
    one[:, 3] = NUM_LOCAL - 1
    many = torch.randint(0, NUM_LOCAL, (270, TOP_K), generator=generator, dtype=torch.int32)  # several CTAs route
    return {
        "one row": any_ids[:1],
        "one pair": torch.where(torch.arange(TOP_K) == 2, 1, -1).to(torch.int32)[None],
        "rows that fill no tile": any_ids,
        "all to the last expert": one,
        "nothing local": torch.full((9, TOP_K), -1, dtype=torch.int32),
        "an expert without rows": torch.where(any_ids == 2, -1, any_ids),
        "many": many,
    }


@functools.cache
def make_layer(name):
    hidden, intermediate = SIZES.get(name, (256, 128))
    if name == "int4":
        return ExpertLayer(*random_int4(NUM_LOCAL, hidden, intermediate, device=DEVICE, zeros=True), kernels="cuda")
    w13 = torch.randn(NUM_LOCAL, 2 * intermediate, hidden, device=DEVICE) * 0.05
    w2 = torch.randn(NUM_LOCAL, hidden, intermediate, device=DEVICE) * 0.05
    if name == "bf16":
        return ExpertLayer(w13.bfloat16(), w2.bfloat16(), kernels="cuda")
    (q13, s13), (q2, s2) = reference.quantize_blocks(w13), reference.quantize_blocks(w2)
    return ExpertLayer(q13, q2, s13, s2, kernels="cuda", form="w8a16" if name == "w8a16" else "fp8")


@pytest.mark.parametrize("name", ["bf16", "fp8", "fp8_wide", "w8a16", "int4"])
@pytest.mark.parametrize("shape", shapes())
def test_ugly_shapes(name, shape):
    layer, ids = make_layer(name), shapes()[shape].to(DEVICE).contiguous()
    x = torch.randn(len(ids), layer.hidden_size, device=DEVICE).bfloat16()
    topk_weights = torch.rand(len(ids), TOP_K, device=DEVICE)
    expert_map = torch.tensor([2, 0, -1, 4, 1], dtype=torch.int32, device=DEVICE)
    every = (
        all_plans(layer.form) if layer.form in ("bf16", "fp8") and shape in ("many", "rows that fill no tile") else []
    )
    for plan in (None, *(p for p in every if p.fits(layer.hidden_size, layer.intermediate_size))):
        assert torch.isfinite(layer.combined(x, ids, topk_weights, plan=plan)).all()
    assert torch.isfinite(layer.combined(x, ids, topk_weights, expert_map=expert_map)).all()
    work = ExpertWork(1, torch.device(DEVICE))
    work.count_for(1)
    for _ in range(2):
        layer.rows(x, ids, work=work.of(0))
    torch.cuda.synchronize()
    assert work.rows(1).sum() == 2 * ((ids >= 0) & (ids < NUM_LOCAL)).sum().item()


@pytest.mark.parametrize("num_requests", [1, 8])
@pytest.mark.parametrize("shape", [(32, 4, 128), (64, 4, 128), (4, 2, 64)], ids=str)
def test_attention_for_few_decodes(shape, num_requests):
    if not takes_decodes(*shape, torch.device(DEVICE)):
        pytest.skip("needs clusters")
    step = decode_step([600, 0, 1, 16, 17, 129, 64, 300][:num_requests], *shape, device=DEVICE)
    *given, scale, out = step.arguments()
    decode_attention(*given, scale=scale, out=out, num_heads=shape[0], num_kv_heads=shape[1])
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("num_tokens", [1, 3, 8])
def test_gate_experts_and_weighted_sum_of_few_tokens(num_tokens):
    if not takes(128, 2048, TOP_K, torch.device(DEVICE)):
        pytest.skip("needs clusters")
    x, residual = (torch.randn(num_tokens, 2048, device=DEVICE).bfloat16() for _ in range(2))
    gate, norm = torch.randn(128, 2048, device=DEVICE).bfloat16(), torch.ones(2048, device=DEVICE).bfloat16()
    ids, topk_weights = gate_linear(x, gate, TOP_K)
    w13, w2 = (torch.randn(2, *shape, device=DEVICE).bfloat16() * 0.05 for shape in ((1536, 2048), (2048, 768)))
    layer = ExpertLayer(w13, w2, kernels="cuda")
    for local in (ids % 2, torch.where(ids % 2 == 1, 0, -1).to(torch.int32)):
        rows = layer.rows(x, local.contiguous())
        assert torch.isfinite(combine_add_rms_norm(rows, topk_weights, residual, norm, 1e-6, ids=local)).all()


def test_the_gate():
    for num_tokens, num_experts, top_k in ((1, 128, 8), (5, 33, 3)):
        ids, _ = gate_topk(torch.randn(num_tokens, num_experts, device=DEVICE), top_k)
        assert ((ids >= 0) & (ids < num_experts)).all()


@pytest.mark.parametrize("num_rows", [1, 13, 33, 129, 200])
def test_products_of_dense_fp8_layers(num_rows):
    w = pack_fp8(torch.randn(384, 512, device=DEVICE).to(torch.float8_e4m3fn), torch.rand(3, 4, device=DEVICE))
    x = torch.randn(num_rows, 512, device=DEVICE).bfloat16()
    ways = [dense_fp8, *([dense_w8a8_few, dense_w8a8] if has_kernel(x.device) else [])]
    assert all(torch.isfinite(way(x, w)).all() for way in ways)
