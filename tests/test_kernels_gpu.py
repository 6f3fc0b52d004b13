"""The kernels on a GPU: every ugly shape against float64, and bit for bit where a promise says so."""

import pytest
import torch

from expertmesh.errors import KernelError
from expertmesh.kernels import jit, reference
from expertmesh.kernels.combine import combine
from expertmesh.kernels.expert_layer import ExpertLayer
from expertmesh.kernels.gate_topk import gate_topk
from expertmesh.kernels.pack import swizzle
from expertmesh.kernels.permute import pack_rows, route, route_and_pack
from expertmesh.kernels.plan import GemmPlan, all_plans

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
DEVICE = "cuda"
HIDDEN, INTERMEDIATE = 256, 128
jit.set_debug(WATCHDOG=1)  # a hang becomes an error
BF16_PLANS = [
    *all_plans("bf16"),
    GemmPlan(m_rows=32, tile=16, stages=32, form="bf16"),  # these are not chosen, but promised to be right
    GemmPlan(m_rows=32, tile=8, stages=40, form="bf16"),
    GemmPlan(m_rows=128, tile=8, stages=13, form="bf16"),
    GemmPlan(m_rows=64, tile=16, stages=20, form="bf16"),
    GemmPlan(m_rows=128, tile=160, stages=5, form="bf16"),
    GemmPlan(m_rows=128, tile=256, stages=4, cluster=2, form="bf16"),
]
FP8_PLANS = [
    *all_plans("fp8"),
    GemmPlan(m_rows=128, tile=8, stages=13, form="fp8"),
    GemmPlan(m_rows=128, tile=112, stages=5, form="fp8"),
    GemmPlan(m_rows=128, tile=112, stages=5, cluster=2, form="fp8"),
    GemmPlan(m_rows=128, tile=128, stages=5, rows_wide=True, form="fp8"),
    GemmPlan(m_rows=128, tile=128, stages=5, cluster=2, rows_wide=True, form="fp8"),
    GemmPlan(m_rows=128, tile=192, stages=4, rows_wide=True, form="fp8"),
    GemmPlan(m_rows=128, tile=256, stages=3, rows_wide=True, form="fp8"),
    GemmPlan(m_rows=128, tile=256, stages=3, cluster=2, rows_wide=True, form="fp8"),
]


def sizes_for(plan):
    """Hidden and intermediate; rows-wide plans need tiles longer than their ring."""
    return (HIDDEN, INTERMEDIATE) if plan.fits(HIDDEN, INTERMEDIATE) else (1024, 768)


def weights(num_local, hidden=HIDDEN, intermediate=INTERMEDIATE, seed=0):
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    w13 = torch.randn(num_local, 2 * intermediate, hidden, device=DEVICE, generator=generator) * 0.05
    w2 = torch.randn(num_local, hidden, intermediate, device=DEVICE, generator=generator) * 0.05
    return w13.bfloat16(), w2.bfloat16()


def fp8_weights(num_local, hidden=HIDDEN, intermediate=INTERMEDIATE, seed=0):
    w13, w2 = weights(num_local, hidden, intermediate, seed)
    (q13, s13), (q2, s2) = reference.quantize_blocks(w13), reference.quantize_blocks(w2)
    return q13, q2, s13, s2


def inputs(num_rows, num_local, kind="random", top_k=8, hidden=HIDDEN, seed=1):
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    x = torch.randn(num_rows, hidden, device=DEVICE, generator=generator).bfloat16()
    wide = max(num_local, top_k)
    ids = torch.rand(num_rows, wide, device=DEVICE, generator=generator).argsort(-1)[:, :top_k].to(torch.int32)
    ids = torch.where(ids < num_local, ids, -1)
    if kind == "sparse":
        keep = torch.rand(num_rows, top_k, device=DEVICE, generator=generator) < 0.2
        ids = torch.where(keep, ids, -1)
    elif kind == "one":  # every row to one expert
        ids = torch.full_like(ids, -1)
        ids[:, top_k // 2] = num_local - 1
    elif kind == "none":
        ids = torch.full_like(ids, -1)
    w = torch.rand(num_rows, top_k, device=DEVICE, generator=generator)
    return x, ids.to(torch.int32).contiguous(), w / w.sum(-1, keepdim=True)


def poison():
    """Leave NaN in the memory that the next allocations get."""
    blocks = [torch.full((n,), float("nan"), device=DEVICE) for n in (1 << 8, 1 << 12, 1 << 16, 1 << 20, 1 << 24)]
    del blocks


def relative_error(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("kind", ["random", "sparse", "one", "none"])
@pytest.mark.parametrize(
    ("num_rows", "num_local", "tile"),
    [(1, 1, 16), (5, 3, 16), (64, 16, 64), (255, 16, 64), (300, 128, 64), (1000, 160, 128)],
)
def test_route_equals_reference(kind, num_rows, num_local, tile):
    _, ids, _ = inputs(num_rows, num_local, kind)
    poison()
    plan = route(ids, num_local, tile)
    counts, rows, tiles = reference.route(ids.cpu(), num_local, tile)
    num_tiles, num_padded, num_pairs, claimed = plan.state.tolist()
    assert (num_tiles, num_padded, num_pairs, claimed) == (len(tiles), len(rows), int(counts.sum()), 0)
    assert plan.num_tokens_per_expert.tolist() == counts.tolist()
    assert plan.pair_of_row[:num_padded].tolist() == rows.tolist()
    assert [tuple(t[:3]) for t in plan.tiles[:num_tiles].tolist()] == tiles
    assert num_padded <= plan.capacity
    assert len(tiles) <= plan.tiles.shape[0]


def test_route_reads_the_expert_map_on_the_device():
    _, ids, _ = inputs(50, 32, "random")
    expert_map = torch.full((32,), -1, dtype=torch.int32, device=DEVICE)
    expert_map[torch.arange(5, 32, 5, device=DEVICE)] = torch.arange(6, dtype=torch.int32, device=DEVICE)
    plan = route(ids, 6, 64, expert_map)
    counts, rows, _ = reference.route(ids.cpu(), 6, 64, expert_map.cpu())
    assert plan.num_tokens_per_expert.tolist() == counts.tolist()
    assert plan.pair_of_row[: len(rows)].tolist() == rows.tolist()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("hidden", [128, 384, 2048])
def test_pack_rows_places_swizzled_blocks(fp8, hidden):
    x, ids, _ = inputs(37, 5, "sparse", hidden=hidden)
    x[3] = 0
    plan = route(ids, 5, 64)
    packed, scales = pack_rows(x, plan, fp8=fp8)
    _, rows, _ = reference.route(ids.cpu(), 5, 64)
    valid = rows >= 0
    blocks = swizzle(packed.view(packed.shape[0], plan.capacity, 8, 16))[:, : len(rows)].reshape(
        packed.shape[0], len(rows), 128
    )
    got = blocks.transpose(0, 1).reshape(len(rows), -1)[valid.to(DEVICE)]
    source = x[(rows[valid] // 8).long().to(DEVICE)]
    if fp8:
        values, expected_scales = reference.quantize_fp8(source)
        assert torch.equal(got, values.view(torch.uint8))
        assert torch.equal(scales[:, : len(rows)].T[valid.to(DEVICE)], expected_scales)
    else:
        assert torch.equal(got, source.contiguous().view(torch.uint8))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("kind", ["random", "sparse", "one", "none"])
@pytest.mark.parametrize(("num_rows", "num_local"), [(1, 1), (1, 16), (5, 200), (64, 5), (65, 40), (511, 256)])
def test_one_launch_gives_the_places_and_rows_of_two(fp8, kind, num_rows, num_local):
    x, ids, _ = inputs(num_rows, num_local, kind, hidden=384)
    expert_map = torch.arange(num_local, dtype=torch.int32, device=DEVICE).flip(0).contiguous()
    for places in (None, expert_map):
        poison()
        plan, packed, scales = route_and_pack(x, ids, num_local, 16, places, granule=16, fp8=fp8)
        expected = route(ids, num_local, 16, places, granule=16)
        expected_packed, expected_scales = pack_rows(x, expected, fp8=fp8)
        num_tiles, num_rows_padded, *_ = expected.state.tolist()
        assert torch.equal(plan.state, expected.state)
        assert torch.equal(plan.num_tokens_per_expert, expected.num_tokens_per_expert)
        assert torch.equal(plan.tiles[:num_tiles], expected.tiles[:num_tiles])
        assert not plan.ready[:num_tiles].any()
        filled = expected.pair_of_row[:num_rows_padded]
        assert torch.equal(plan.pair_of_row[:num_rows_padded], filled)
        written = (filled >= 0).nonzero().flatten()
        assert torch.equal(packed[:, written], expected_packed[:, written])
        assert not fp8 or torch.equal(scales[:, written], expected_scales[:, written])


@pytest.mark.parametrize("plan", BF16_PLANS)
@pytest.mark.parametrize("kind", ["random", "sparse", "one", "none"])
@pytest.mark.parametrize(("num_rows", "num_local"), [(1, 1), (1, 16), (7, 3), (33, 16), (129, 4), (700, 5)])
def test_bf16_rows_are_near_float64(plan, kind, num_rows, num_local):
    w13, w2 = weights(num_local)
    x, ids, topk_weights = inputs(num_rows, num_local, kind)
    layer = ExpertLayer(w13, w2, kernels="cuda")
    poison()
    y = layer.rows(x, ids, plan=plan)
    expected = reference.expert_rows(x, ids, w13, w2, dtype=torch.float64)
    local = ids >= 0
    if local.any():
        assert relative_error(y[local], expected[local]) < 1e-2
    poison()
    combined = layer.combined(x, ids, topk_weights, plan=plan)
    assert torch.isfinite(combined).all()
    assert relative_error(combined, reference.combine(expected, ids, topk_weights, dtype=torch.float64)) < 1e-2


@pytest.mark.parametrize("plan", FP8_PLANS)
@pytest.mark.parametrize("kind", ["random", "sparse", "one", "none"])
@pytest.mark.parametrize(("num_rows", "num_local"), [(1, 1), (1, 16), (33, 16), (129, 4), (700, 5)])
def test_fp8_rows_are_near_float64(plan, kind, num_rows, num_local):
    hidden, intermediate = sizes_for(plan)
    packed = fp8_weights(num_local, hidden, intermediate)
    x, ids, _ = inputs(num_rows, num_local, kind, hidden=hidden)
    poison()
    y = ExpertLayer(*packed, kernels="cuda").rows(x, ids, plan=plan)
    local = ids >= 0
    if not local.any():
        return
    same_activations = reference.expert_rows_fp8(x, ids, *packed, dtype=torch.float64)[local]
    assert relative_error(y[local], same_activations) < 1e-2
    if local.sum() < 100:
        return  # the format's own error is promised over many rows
    full = [reference.dequantize_blocks(w, s) for w, s in zip(packed[:2], packed[2:])]
    assert relative_error(y[local], reference.expert_rows(x, ids, *full, dtype=torch.float64)[local]) < 6e-2


@pytest.mark.parametrize(("hidden", "intermediate"), [(128, 64), (384, 192), (640, 448), (2048, 768)])
def test_any_shape_of_the_grain_works(hidden, intermediate):
    w13, w2 = weights(4, hidden, intermediate)
    x, ids, _ = inputs(40, 4, hidden=hidden)
    layer = ExpertLayer(w13, w2, kernels="cuda")
    expected = reference.expert_rows(x, ids, w13, w2, dtype=torch.float64)
    for plan in BF16_PLANS if hidden == 640 else BF16_PLANS[:2]:  # the widest plans compile slowly
        if not plan.fits(hidden, intermediate):
            continue
        y = layer.rows(x, ids, plan=plan)
        assert relative_error(y[ids >= 0], expected[ids >= 0]) < 1e-2


@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_a_row_does_not_depend_on_other_rows_their_order_or_the_plan(form):
    packed = fp8_weights(8, 1024, 768) if form == "fp8" else weights(8, 512, 256)
    layer = ExpertLayer(*packed, kernels="cuda")
    plans = FP8_PLANS if form == "fp8" else BF16_PLANS
    x, ids, topk_weights = inputs(600, 8, "random", hidden=layer.hidden_size)
    y, out = layer.rows(x, ids, plan=plans[0]), layer.combined(x, ids, topk_weights, plan=plans[0])
    for plan in plans:
        assert torch.equal(layer.rows(x, ids, plan=plan), y)
        assert torch.equal(layer.combined(x, ids, topk_weights, plan=plan), out)
        order = torch.randperm(600, device=DEVICE)
        assert torch.equal(layer.rows(x[order], ids[order], plan=plan), y[order])
        for count in (1, 2, 9, 77):
            assert torch.equal(layer.rows(x[:count].contiguous(), ids[:count].contiguous(), plan=plan), y[:count])


@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_plans_agree_at_the_size_of_a_prefill(form):
    packed = fp8_weights(16, 2048, 768) if form == "fp8" else weights(16, 2048, 768)
    layer = ExpertLayer(*packed, kernels="cuda")
    x, ids, topk_weights = inputs(4096, 128, hidden=2048)
    ids = torch.where(ids < 16, ids, -1).to(torch.int32)
    plans = [plan for plan in all_plans(form) if plan.tile >= 64]
    y = layer.rows(x, ids, plan=plans[0])[ids >= 0]
    out = layer.combined(x, ids, topk_weights, plan=plans[0])
    for _ in range(20):
        for plan in plans:
            assert torch.equal(layer.rows(x, ids, plan=plan)[ids >= 0], y)
            assert torch.equal(layer.combined(x, ids, topk_weights, plan=plan), out)


def test_a_row_does_not_depend_on_the_number_of_local_experts():
    w13, w2 = weights(8)
    x, ids, _ = inputs(100, 8)
    whole = ExpertLayer(w13, w2, kernels="cuda").rows(x, ids)
    part = ExpertLayer(w13[2:5].contiguous(), w2[2:5].contiguous(), kernels="cuda")
    shifted = torch.where((ids >= 2) & (ids < 5), ids - 2, -1).to(torch.int32)
    got = part.rows(x, shifted)
    assert torch.equal(got[shifted >= 0], whole[shifted >= 0])


def test_nan_in_one_row_stays_in_it():
    w13, w2 = weights(4)
    x, ids, topk_weights = inputs(40, 4)
    layer = ExpertLayer(w13, w2, kernels="cuda")
    clean = layer.combined(x, ids, topk_weights)
    x[7] = float("nan")
    dirty = layer.combined(x, ids, topk_weights)
    others = torch.arange(40, device=DEVICE) != 7
    assert torch.equal(dirty[others], clean[others])
    assert torch.isnan(dirty[7]).all()


@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_graph_replays_follow_new_ids(form):
    packed = fp8_weights(8) if form == "fp8" else weights(8)
    layer = ExpertLayer(*packed, kernels="cuda")
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


def test_combine_sums_in_k_order_in_float32():
    _, ids, topk_weights = inputs(200, 16, "sparse", hidden=1536)
    y = torch.randn(200, 8, 1536, device=DEVICE).bfloat16()
    y[ids < 0] = float("nan")
    expected = reference.combine(y.double(), ids, topk_weights, dtype=torch.float64)
    got = combine(y, ids, topk_weights)
    assert torch.isfinite(got).all()
    assert relative_error(got, expected) < 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 128, 8), (77, 160, 8), (33, 8, 2), (5, 512, 10)])
def test_gate_equals_reference(dtype, num_tokens, num_experts, top_k):
    logits = torch.randn(num_tokens, num_experts, device=DEVICE).to(dtype)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=DEVICE)
    ids, topk_weights = gate_topk(logits, top_k, counts=counts)
    expected_ids, expected_weights = reference.gate_topk(logits, top_k)
    assert torch.equal(ids, expected_ids)
    assert torch.allclose(topk_weights, expected_weights, rtol=1e-5, atol=1e-7)
    assert torch.equal(counts, torch.bincount(ids.flatten().long(), minlength=num_experts).to(torch.int32))


def test_gate_ties_go_to_the_lower_expert_and_nan_goes_nowhere():
    logits = torch.zeros(3, 128, device=DEVICE)
    logits[1, 100:110] = 4.0
    logits[2, 5] = float("nan")
    ids, _ = gate_topk(logits, 8)
    assert ids[0].tolist() == list(range(8))
    assert ids[1].tolist() == list(range(100, 108))
    assert ids[2].tolist() == [-1] * 8


def test_wrong_inputs_are_named():
    layer = ExpertLayer(*weights(2), kernels="cuda")
    x, ids, _ = inputs(4, 2)
    with pytest.raises(KernelError, match="bfloat16"):
        layer.rows(x.float(), ids)
    with pytest.raises(KernelError, match="int32"):
        layer.rows(x, ids.long())
    with pytest.raises(KernelError, match="multiple of 128"):
        ExpertLayer(*weights(2, 192, 64), kernels="cuda")
    assert layer.rows(x[:0], ids[:0]).shape == (0, 8, HIDDEN)


def test_plan_shared_memory_fits():
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    plans: list[GemmPlan] = [*BF16_PLANS, *FP8_PLANS]
    assert all(p.shared_bytes <= limit for p in plans)


def test_gate_routes_padding_nowhere():
    logits = torch.randn(37, 128, device=DEVICE)
    expected, _ = gate_topk(logits, 8)
    counts = torch.zeros(128, dtype=torch.int32, device=DEVICE)
    ids, _ = gate_topk(logits, 8, counts=counts, num_valid=torch.tensor([5], dtype=torch.int32, device=DEVICE))
    assert ids[:5].equal(expected[:5])
    assert (ids[5:] == -1).all()
    assert int(counts.sum()) == 40
