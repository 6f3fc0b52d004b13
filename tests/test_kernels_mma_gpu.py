"""int4, W8A16 and bf16 by mma.sync on a GPU: every ugly shape against float64 on the same dequantised weights, and bit
for bit where a promise says so; both ways of copying (bulk and cp.async)."""

import pytest
import torch

from expertmesh.errors import KernelError
from expertmesh.kernels import jit, reference
from expertmesh.kernels.expert_layer import ExpertLayer
from expertmesh.kernels.grouped_gemm_mma import choose_mma_plan, grouped_gemm_mma, make_plan
from expertmesh.kernels.pack_int4 import random_int4
from expertmesh.kernels.pack_mma import pack_mma
from expertmesh.kernels.permute import route
from expertmesh.quantized import dequantize_int4

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
DEVICE = "cuda"
HIDDEN, INTERMEDIATE = 256, 128
SHAPES = [(64, 8, 1, 4), (64, 8, 2, 4), (64, 8, 2, 2), (64, 16, 2, 2), (128, 8, 1, 2), (64, 32, 1, 4), (64, 32, 1, 2)]
FORMS = ["bf16", "w8a16", "int4", "int4-zeros"]


@pytest.fixture(autouse=True, scope="module", params=["bulk", "cp.async"])
def copies(request):
    jit.set_debug(WATCHDOG=1, **({"CP_ASYNC": 1} if request.param == "cp.async" else {}))
    yield
    jit.set_debug(WATCHDOG=1)


def plans(form):
    kind, zeros = form.split("-")[0], form.endswith("zeros")
    return [make_plan(m, tile, kind, ctas=ctas, parts=parts, has_zeros=zeros) for m, tile, ctas, parts in SHAPES]


def weights(form, num_local, hidden=HIDDEN, intermediate=INTERMEDIATE, seed=3):
    """(arguments of ExpertLayer, the weights they stand for in float64)."""
    w13, w2 = random_int4(num_local, hidden, intermediate, device=DEVICE, zeros=form == "int4-zeros", seed=seed)
    exact = [dequantize_int4(w, torch.float64) for w in (w13, w2)]
    if form.startswith("int4"):
        return (w13, w2), exact
    if form == "bf16":
        plain = [w.bfloat16() for w in exact]
        return tuple(plain), [w.double() for w in plain]
    (q13, s13), (q2, s2) = (reference.quantize_blocks(w) for w in exact)
    return (q13, q2, s13, s2), [
        reference.dequantize_blocks(q, s, dtype=torch.float64) for q, s in ((q13, s13), (q2, s2))
    ]


def mma_layer(form, arguments):
    """An ExpertLayer on the mma path, for bf16 too."""
    if form != "bf16":
        return ExpertLayer(*arguments, kernels="cuda", form="w8a16" if form == "w8a16" else None)
    layer = ExpertLayer(*arguments, kernels="cuda")
    layer.packed = pack_mma(*arguments)
    return layer


def inputs(num_rows, num_local, kind="random", top_k=8, hidden=HIDDEN, seed=1):
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    x = torch.randn(num_rows, hidden, device=DEVICE, generator=generator).bfloat16()
    ids = torch.rand(num_rows, max(num_local, top_k), device=DEVICE, generator=generator).argsort(-1)[:, :top_k]
    ids = torch.where(ids < num_local, ids, -1)
    if kind == "sparse":
        ids = torch.where(torch.rand(num_rows, top_k, device=DEVICE, generator=generator) < 0.2, ids, -1)
    elif kind in ("one", "none"):  # every row to one expert, or nowhere
        ids = torch.full_like(ids, -1)
        if kind == "one":
            ids[:, top_k // 2] = num_local - 1
    w = torch.rand(num_rows, top_k, device=DEVICE, generator=generator)
    return x, ids.to(torch.int32).contiguous(), w / w.sum(-1, keepdim=True)


def poison():
    """Leave NaN in the memory that the next allocations get."""
    blocks = [torch.full((n,), float("nan"), device=DEVICE) for n in (1 << 8, 1 << 12, 1 << 16, 1 << 20, 1 << 24)]
    del blocks


def relative_error(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["random", "sparse", "one", "none"])
@pytest.mark.parametrize(("num_rows", "num_local"), [(1, 1), (1, 16), (7, 3), (33, 16), (129, 4), (700, 5)])
def test_rows_are_near_float64(form, kind, num_rows, num_local):
    arguments, exact = weights(form, num_local)
    x, ids, topk_weights = inputs(num_rows, num_local, kind)
    layer = mma_layer(form, arguments)
    expected = reference.expert_rows(x, ids, *exact, dtype=torch.float64)
    local = ids >= 0
    for plan in plans(form):
        poison()
        y = layer.rows(x, ids, plan=plan)
        if local.any():
            assert relative_error(y[local], expected[local]) < 1e-2
        poison()
        combined = layer.combined(x, ids, topk_weights, plan=plan)
        assert torch.isfinite(combined).all()
        assert relative_error(combined, reference.combine(expected, ids, topk_weights, dtype=torch.float64)) < 1e-2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("hidden", "intermediate"), [(128, 128), (384, 256), (640, 384), (2048, 768)])
def test_any_shape_of_the_grain_works(form, hidden, intermediate):
    arguments, exact = weights(form, 4, hidden, intermediate)
    x, ids, _ = inputs(40, 4, hidden=hidden)
    expected = reference.expert_rows(x, ids, *exact, dtype=torch.float64)[ids >= 0]
    assert relative_error(mma_layer(form, arguments).rows(x, ids)[ids >= 0], expected) < 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_a_row_does_not_depend_on_other_rows_their_order_the_plan_or_the_number_of_experts(form):
    arguments, _ = weights(form, 8, 512, 256)
    layer = mma_layer(form, arguments)
    x, ids, topk_weights = inputs(600, 8, hidden=512)
    y, out = layer.rows(x, ids, plan=plans(form)[0]), layer.combined(x, ids, topk_weights, plan=plans(form)[0])
    for plan in plans(form):
        assert torch.equal(layer.rows(x, ids, plan=plan), y)
        assert torch.equal(layer.combined(x, ids, topk_weights, plan=plan), out)
        order = torch.randperm(600, device=DEVICE)
        assert torch.equal(layer.rows(x[order], ids[order], plan=plan), y[order])
        for count in (1, 2, 9, 77):
            assert torch.equal(layer.rows(x[:count].contiguous(), ids[:count].contiguous(), plan=plan), y[:count])
    part = mma_layer(form, tuple(w[2:5] for w in arguments))
    shifted = torch.where((ids >= 2) & (ids < 5), ids - 2, -1).to(torch.int32)
    assert torch.equal(part.rows(x, shifted)[shifted >= 0], y[shifted >= 0])


@pytest.mark.parametrize("form", FORMS)
def test_nan_in_one_row_stays_in_it(form):
    layer = mma_layer(form, weights(form, 4)[0])
    x, ids, topk_weights = inputs(40, 4)
    clean = layer.combined(x, ids, topk_weights)
    x[7] = float("nan")
    dirty = layer.combined(x, ids, topk_weights)
    others = torch.arange(40, device=DEVICE) != 7
    assert torch.equal(dirty[others], clean[others])
    assert torch.isnan(dirty[7]).all()


@pytest.mark.parametrize("form", FORMS)
def test_graph_replays_follow_new_ids(form):
    layer = mma_layer(form, weights(form, 8)[0])
    x, ids, topk_weights = inputs(64, 8)
    layer.combined(x, ids, topk_weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.combined(x, ids, topk_weights)
    for kind in ("random", "sparse", "one", "none", "random"):
        x2, ids2, w2 = inputs(64, 8, kind, seed=9)
        x.copy_(x2), ids.copy_(ids2), topk_weights.copy_(w2)
        graph.replay()
        assert torch.equal(out, layer.combined(x2, ids2, w2))


def test_every_e4m3_value_is_widened_exactly():
    """Row i makes SwiGLU row 448 x (one-hot i), so that y[i] is column i of w2, times 448: exact in bf16."""
    eye = torch.eye(256, device=DEVICE)
    w13 = torch.cat((448 * eye, eye))[None].to(torch.float8_e4m3fn)
    values = (torch.arange(256, device=DEVICE)[:, None] + torch.arange(256, device=DEVICE)).remainder(256)
    w2 = torch.where((values & 0x7F) == 0x7F, 0, values).to(torch.uint8)[None].view(torch.float8_e4m3fn)  # no NaN
    scales = [torch.ones(1, rows // 128, 2, device=DEVICE) for rows in (512, 256)]
    layer = ExpertLayer(w13, w2, *scales, kernels="cuda", form="w8a16")
    got = layer.rows(eye.bfloat16(), torch.zeros(256, 1, dtype=torch.int32, device=DEVICE))[:, 0]
    assert torch.equal(got.float(), 448 * w2[0].float().T)


def test_ten_thousand_random_pairs_in_small_cases():
    generator = torch.Generator().manual_seed(5)
    arguments, exact = weights("int4-zeros", 6)
    layer = mma_layer("int4-zeros", arguments)
    for case in range(60):
        num_rows, top_k = (int(torch.randint(1, high, (), generator=generator)) for high in (60, 7))
        x, ids, topk_weights = inputs(num_rows, 6, "random" if case % 2 else "sparse", top_k=top_k, seed=case)
        y = reference.expert_rows(x, ids, *exact, dtype=torch.float64)
        expected = reference.combine(y, ids, topk_weights, dtype=torch.float64)
        assert relative_error(layer.combined(x, ids, topk_weights), expected) < 1e-2


def test_bf16_scales_are_read_as_such():
    (w13, w2), _ = weights("int4", 2)
    made = [type(w)(w.nibbles, w.scales.bfloat16(), None) for w in (w13, w2)]
    x, ids, _ = inputs(9, 2)
    exact = [dequantize_int4(w, torch.float64) for w in made]
    expected = reference.expert_rows(x, ids, *exact, dtype=torch.float64)[ids >= 0]
    assert relative_error(ExpertLayer(*made, kernels="cuda").rows(x, ids)[ids >= 0], expected) < 1e-2


def test_rows_that_are_not_local_are_not_written():
    packed = pack_mma(*weights("int4", 4)[0])
    x, ids, _ = inputs(20, 4, "sparse")
    out = torch.full((20, 8, HIDDEN), 7.0, device=DEVICE).bfloat16()
    plan = choose_mma_plan("int4", 20, 4, HIDDEN, INTERMEDIATE)
    grouped_gemm_mma(x, packed, route(ids, 4, plan.tile), plan, out)
    assert (out[ids < 0] == 7).all()
    assert not (out[ids >= 0] == 7).any()


def test_wrong_inputs_are_named():
    layer = mma_layer("int4", weights("int4", 2)[0])
    x, ids, _ = inputs(4, 2)
    with pytest.raises(KernelError, match="bfloat16"):
        layer.rows(x.float(), ids)
    with pytest.raises(KernelError, match="int32"):
        layer.rows(x, ids.long())
    with pytest.raises(KernelError, match="multiple of 128"):
        ExpertLayer(*random_int4(1, 192, 128, device=DEVICE), kernels="cuda")
    assert layer.rows(x[:0], ids[:0]).shape == (0, 8, HIDDEN)
