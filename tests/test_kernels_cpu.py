"""What can be promised of the kernels without a GPU: layouts, references, plans, and that every source compiles
cleanly."""

import pytest
import torch
import torch.nn.functional as F
from compiling import compile_each, compile_for

from expertmesh.errors import KernelError
from expertmesh.kernels import jit, pack, reference
from expertmesh.kernels.expert_layer import ExpertLayer
from expertmesh.kernels.permute import takes_one_launch
from expertmesh.kernels.plan import PLANS, SHARED_BYTES_LIMIT, GemmPlan, all_plans, choose_plan

pytestmark = pytest.mark.usefixtures("private_cubins")


# ------------------------------------------------------------------------------------------------------------- layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("hidden", "intermediate"), [(128, 128), (384, 256), (256, 384)])
def test_packing_has_an_exact_inverse(dtype, hidden, intermediate):
    w13 = torch.randint(0, 255, (3, 2 * intermediate, hidden * dtype.itemsize), dtype=torch.uint8).view(dtype)
    w2 = torch.randint(0, 255, (3, hidden, intermediate * dtype.itemsize), dtype=torch.uint8).view(dtype)
    assert torch.equal(pack.unpack_w13(pack.pack_w13(w13), dtype).view(torch.uint8), w13.view(torch.uint8))
    assert torch.equal(pack.unpack_w2(pack.pack_w2(w2), dtype).view(torch.uint8), w2.view(torch.uint8))


def test_packed_w13_holds_gate_and_up_of_one_output_eight_rows_apart():
    hidden, intermediate = 128, 64
    w13 = (
        torch.arange(2 * intermediate * hidden, dtype=torch.int32)
        .remainder(251)
        .to(torch.bfloat16)
        .view(1, 2 * intermediate, hidden)
    )
    blocks = pack.pack_w13(w13).view(torch.bfloat16).view(1, 1, 2, 128, 8, 8)
    for output, column in ((0, 0), (9, 70), (63, 127)):
        row = output // 8 * 16 + output % 8
        piece = (column % 64 // 8) ^ (row % 8)
        assert blocks[0, 0, column // 64, row, piece, column % 8] == w13[0, output, column]
        assert blocks[0, 0, column // 64, row + 8, piece, column % 8] == w13[0, intermediate + output, column]


def test_shapes_without_a_kernel_are_refused_with_the_reason():
    with pytest.raises(KernelError, match="multiple of 128"):
        pack.pack_experts(torch.zeros(2, 128, 192).bfloat16(), torch.zeros(2, 192, 64).bfloat16())
    with pytest.raises(KernelError, match="does not fit"):
        pack.pack_experts(torch.zeros(2, 128, 256).bfloat16(), torch.zeros(2, 128, 64).bfloat16())
    w13 = torch.zeros(1, 256, 256).to(torch.float8_e4m3fn)
    with pytest.raises(KernelError, match="w13_scales"):
        pack.pack_experts(w13, torch.zeros(1, 256, 128).to(torch.float8_e4m3fn))


# ---------------------------------------------------------------------------------------------------------- references
def test_gate_takes_the_lower_expert_on_ties_and_sums_to_one():
    ids, weights = reference.gate_topk(torch.zeros(2, 16), 4)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2
    assert torch.allclose(weights.sum(-1), torch.ones(2))


def test_route_reference_keeps_every_pair_once_and_pads_to_eight():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 6, (40, 4), generator=generator, dtype=torch.int32)
    counts, rows, tiles = reference.route(ids, 5, 16)
    kept = rows[rows >= 0].tolist()
    assert sorted(kept) == [p for p, e in enumerate(ids.flatten().tolist()) if 0 <= e < 5]
    assert int(counts.sum()) == len(kept)
    assert len(rows) % 8 == 0
    assert all(first % 8 == 0 and 0 < n <= 16 for _, first, n in tiles)
    assert sum(n for _, _, n in tiles) == len(kept)
    assert all((ids.flatten()[rows[f : f + n].long()] == e).all() for e, f, n in tiles)


def test_expert_rows_reference_equals_a_loop_and_leaves_minus_one_zero():
    w13, w2 = torch.randn(3, 16, 8).double(), torch.randn(3, 8, 8).double()
    x, ids = torch.randn(5, 8).double(), torch.tensor([[0, 2], [-1, 1], [2, -1], [-1, -1], [1, 0]])
    y = reference.expert_rows(x, ids, w13, w2)
    for r in range(5):
        for k in range(2):
            e = int(ids[r, k])
            gate, up = (w13[e] @ x[r]).chunk(2) if e >= 0 else (torch.zeros(8), torch.zeros(8))
            expected = w2[e] @ (F.silu(gate) * up) if e >= 0 else torch.zeros(8).double()
            assert torch.allclose(y[r, k], expected)


def test_combine_skips_what_minus_one_rows_hold():
    y = torch.full((2, 2, 4), float("nan"))
    y[0, 1] = 2.0
    out = reference.combine(y, torch.tensor([[-1, 3], [-1, -1]]), torch.full((2, 2), 0.5))
    assert out.tolist() == [[1.0] * 4, [0.0] * 4]


def test_fp8_forms_come_back_within_the_format():
    x = torch.randn(6, 256)
    x[2] = 0
    assert ((reference.dequantize_fp8(*reference.quantize_fp8(x)) - x).norm() / x.norm()) < 0.04
    w = torch.randn(2, 256, 384)
    assert ((reference.dequantize_blocks(*reference.quantize_blocks(w)) - w).norm() / w.norm()) < 0.04


def test_torch_path_serves_any_shape_and_says_so_once(caplog):
    w13, w2 = torch.randn(3, 20, 6), torch.randn(3, 6, 10)
    x, ids, weights = (
        torch.randn(4, 6),
        torch.tensor([[0, -1], [2, 1], [-1, -1], [1, 2]], dtype=torch.int32),
        torch.rand(4, 2),
    )
    with caplog.at_level("WARNING"):
        layers = [ExpertLayer(w13, w2) for _ in range(3)]
    assert sum("plain torch" in r.message for r in caplog.records) <= 1
    expected = reference.combine(reference.expert_rows(x, ids, w13, w2), ids, weights)
    assert torch.equal(layers[0].combined(x, ids, weights), expected)
    with pytest.raises(KernelError, match="no expert kernels"):
        ExpertLayer(w13, w2, kernels="cuda")


# --------------------------------------------------------------------------------------------------------------- plans
def test_plans_fit_shared_memory_and_widen_with_the_rows():
    for form in PLANS:
        assert all(p.shared_bytes + p.static_shared_bytes <= SHARED_BYTES_LIMIT for p in all_plans(form))
        tiles = [choose_plan(form, pairs, 16, 4096, 1536).tile for pairs in (1, 8, 64, 512, 1024, 4096, 65536)]
        assert tiles == sorted(tiles)


def test_one_launch_routes_and_gathers_only_what_its_memory_holds_and_gains_by():
    assert takes_one_launch(8, 1.0, 16)
    assert takes_one_launch(4096, 512.0, 16)  # an eighth of 512 tokens' pairs
    assert not takes_one_launch(4096, 4096.0, 128)  # all of them: more rows than its few warps gather quickly
    assert not takes_one_launch(4104, 512.0, 16)
    assert not takes_one_launch(8, 1.0, 300)


@pytest.mark.parametrize("form", PLANS)
@pytest.mark.parametrize(("hidden", "intermediate"), [(128, 64), (256, 128), (640, 448), (1024, 512), (2048, 768)])
def test_a_chosen_plan_fits_the_sizes(form, hidden, intermediate):
    for pairs in (1, 8, 100, 1000, 10_000, 100_000):
        assert choose_plan(form, pairs, 4, hidden, intermediate).fits(hidden, intermediate)


def test_rows_are_the_wide_operand_only_where_no_warpgroup_can_be_a_tile_ahead():
    plan = choose_plan("fp8", 100_000, 16, 2048, 768)
    assert plan.rows_wide
    assert plan.stages < 768 // 128
    assert not plan.fits(2048, 128 * plan.stages)
    assert not choose_plan("fp8", 100_000, 16, 2048, 128 * plan.stages).rows_wide


# ---------------------------------------------------------------------------------------------------------- compilation
@pytest.mark.parametrize(
    ("file", "defines"),
    [
        ("permute.cu", {"NUM_EXPERTS": 128, "HIDDEN": 4096, "TOP_K": 8}),
        ("permute.cu", {"NUM_EXPERTS": 16, "HIDDEN": 2048, "TOP_K": 8, "FP8": 1}),
        ("permute_few.cu", {"NUM_EXPERTS": 128, "HIDDEN": 4096, "TOP_K": 8}),
        ("permute_few.cu", {"NUM_EXPERTS": 16, "HIDDEN": 2048, "TOP_K": 8, "FP8": 1, "MAX_PAIRS": 512}),
        ("permute_pairs.cu", {"NUM_EXPERTS": 128, "HIDDEN": 2048, "TOP_K": 8, "TILE": 8}),
        ("permute_pairs.cu", {"NUM_EXPERTS": 16, "HIDDEN": 4096, "TOP_K": 8, "FP8": 1, "TILE": 64}),
        ("combine.cu", {"HIDDEN": 4096, "TOP_K": 8}),
        ("gate_topk.cu", {"NUM_EXPERTS": 128, "TOP_K": 8}),
        ("bench_ceiling.cu", {}),
    ],
)
def test_kernels_compile_without_spills(file, defines):
    for compiled in compile_for(jit.SUPPORTED_ARCHS, file, defines):
        assert compiled.use()
        assert all(u.clean for u in compiled.use()), (compiled.key, compiled.use())


ROWS_WIDE = GemmPlan(m_rows=128, tile=128, stages=5, rows_wide=True, form="fp8")


def test_grouped_gemm_compiles_for_hopper_without_spills():
    plans = [*all_plans("bf16"), *all_plans("fp8"), ROWS_WIDE]
    each = compile_each(("grouped_gemm.cu", "sm_90a", plan.defines(2048, 768)) for plan in plans)
    for plan, compiled in zip(plans, each, strict=True):
        assert [u.name for u in compiled.use()] == ["grouped_gemm"]
        assert all(u.clean for u in compiled.use()), (plan, compiled.use())
        assert "serialized" not in compiled.log, plan  # ptxas says so when wgmma cannot run asynchronously


def test_a_compile_error_carries_the_log():
    with pytest.raises(KernelError, match="does not compile"):
        jit.compile_only("gate_topk.cu", "sm_90a", {"NUM_EXPERTS": -1})


def test_cubins_are_kept_on_disk_under_a_key_of_flags_and_architecture():
    one = jit.compile_only("combine.cu", "sm_80", {"HIDDEN": 512})
    other = jit.compile_only("combine.cu", "sm_90a", {"HIDDEN": 512})
    assert one.key != other.key
    assert jit._read_cache(one.key) == one


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_error_says_what_to_do():
    with pytest.raises(KernelError, match="kernels='torch'"):
        jit.architecture(0)
