"""From the output product to the experts at few tokens, on a GPU: launches that do more give the bits of those that do
less, with every row alone, and again and again."""

import pytest
import torch

from expertmesh.errors import KernelError
from expertmesh.kernels import combine_norm, permute
from expertmesh.kernels.add_norm import add_rms_norm
from expertmesh.kernels.combine_norm import combine_add_rms_norm, combine_norm_kernel
from expertmesh.kernels.gate_linear import gate_linear
from expertmesh.kernels.norm_gate import norm_gate, takes
from expertmesh.kernels.permute import route_and_pack

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if torch.cuda.get_device_capability()[0] < 9:
    pytest.skip("needs clusters of CTAs", allow_module_level=True)
DEVICE = "cuda"
BF16 = torch.bfloat16
EPS = 1e-6
NAN = float("nan")
SHAPES = ((2048, 128, 8), (4096, 128, 8), (2048, 64, 4), (4096, 256, 8), (512, 8, 1), (1024, 16, 2), (2048, 32, 8))


def noise(*shape, seed=0, scale=1.0):
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    return (torch.randn(shape, device=DEVICE, generator=generator) * scale).to(BF16)


def given(num_tokens, hidden, num_experts, seed=0):
    y, residual = noise(num_tokens, hidden, seed=seed), noise(num_tokens, hidden, seed=seed + 1, scale=3)
    return y, residual, noise(hidden, seed=2), noise(num_experts, hidden, seed=3, scale=0.05)


def separate(y, residual, weight, gate, top_k, **options):
    """The new residual, x, ids and weights by a launch for the norm and one for the gate."""
    residual = residual.clone()
    x = add_rms_norm(y, residual, weight, EPS)
    return residual, x, *gate_linear(x, gate, top_k, **options)


def fused(y, residual, weight, gate, top_k, **options):
    residual = residual.clone()
    return residual, *norm_gate(y, residual, weight, EPS, gate, top_k, **options)


def assert_same(got, expected):
    for name, one, other in zip(("residual", "x", "ids", "weights"), got, expected):
        assert one.shape == other.shape
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)), name
        assert torch.equal(one.isnan(), other.isnan()), name


@pytest.mark.parametrize(("hidden", "num_experts", "top_k"), SHAPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 32])
def test_norm_and_gate_in_one_launch_are_the_two(num_tokens, hidden, num_experts, top_k):
    y, residual, weight, gate = given(num_tokens, hidden, num_experts)
    assert_same(fused(y, residual, weight, gate, top_k), separate(y, residual, weight, gate, top_k))
    assert_same(
        fused(y, residual, weight, gate, top_k, renormalize=False),
        separate(y, residual, weight, gate, top_k, renormalize=False),
    )


@pytest.mark.parametrize("hidden", [2048, 4096])
@pytest.mark.parametrize("num_tokens", [1, 3, 8])
def test_padding_counts_ties_and_rows_that_are_not_numbers(num_tokens, hidden):
    y, residual, weight, gate = given(num_tokens, hidden, 128)
    gate[64:] = gate[:64]  # every logit twice
    rows = torch.arange(num_tokens, device=DEVICE)
    for padding, spoilt in ((), ()), ((0,), ()), ((num_tokens - 1,), (0,)), ((), (num_tokens - 1,)):
        slots = rows.clone()
        slots[list(padding)] = -1
        y[list(spoilt), 5] = NAN
        counts = [torch.full((128,), 3, dtype=torch.int32, device=DEVICE) for _ in range(2)]
        got = fused(y, residual, weight, gate, 8, rows=slots, counts=counts[0])
        assert_same(got, separate(y, residual, weight, gate, 8, rows=slots, counts=counts[1]))
        assert torch.equal(*counts)
        assert bool((got[2][list(padding)] == -1).all())
    y[0, 0], residual[0, 0] = float("inf"), 1.0
    assert_same(fused(y, residual, weight, gate, 8), separate(y, residual, weight, gate, 8))


def test_rows_do_not_see_each_other():
    y, residual, weight, gate = given(8, 2048, 128)
    whole = fused(y, residual, weight, gate, 8)
    for row in range(8):
        alone = fused(y[row : row + 1], residual[row : row + 1], weight, gate, 8)
        assert_same(alone, [t[row : row + 1] for t in whole])
    y[3] = NAN
    others = [0, 1, 2, 4, 5, 6, 7]
    assert_same([t[others] for t in fused(y, residual, weight, gate, 8)], [t[others] for t in whole])


@pytest.mark.parametrize("num_tokens", [1, 5, 8])
def test_a_hundred_replays_give_the_same_bits(num_tokens):
    """In a graph of layers in a row, each of which begins where the one before left the residual."""
    y, start, weight, gate = given(num_tokens, 2048, 128)
    residual, x = start.clone(), torch.empty_like(start)

    def layers():
        residual.copy_(start)
        chosen = []
        for _ in range(6):
            chosen += norm_gate(y, residual, weight, EPS, gate, 8, out=x)[1:]
        return residual, x, *chosen

    expected_residual, ids = start.clone(), []
    for _ in range(6):
        expected_x = add_rms_norm(y, expected_residual, weight, EPS)
        ids += gate_linear(expected_x, gate, 8)
    expected = (expected_residual, expected_x, *ids)
    layers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = layers()
    for _ in range(100):
        for tensor in made:
            tensor.fill_(0)
        graph.replay()
        for tensor, wanted in zip(made, expected):
            assert torch.equal(tensor, wanted)


def test_what_it_does_not_take_is_refused():
    assert not takes(128, 2560, 8, torch.device(DEVICE))
    y, residual, weight, gate = given(1, 256, 64)
    with pytest.raises(KernelError, match="use add_rms_norm and gate_linear"):
        norm_gate(y, residual, weight, EPS, gate, 8)


# ------------------------------------------------------------------------------------------------- behind the experts
@pytest.mark.parametrize("row_ctas", [2, 4, 8])
@pytest.mark.parametrize(("hidden", "top_k"), [(2048, 8), (4096, 8), (8192, 3)])
@pytest.mark.parametrize("num_tokens", [1, 3, 8])
def test_a_row_shared_by_a_cluster_has_the_bits_of_one_cta(monkeypatch, num_tokens, hidden, top_k, row_ctas):
    y, weights = noise(num_tokens, top_k, hidden), torch.rand(num_tokens, top_k, device=DEVICE)
    residual, weight = noise(num_tokens, hidden, seed=1), noise(hidden, seed=2)
    ids = torch.zeros(num_tokens, top_k, dtype=torch.int32, device=DEVICE)
    ids[:, 0], ids[-1] = -1, -1
    weights[ids < 0], y[ids < 0] = NAN, NAN
    for some in (ids, None):
        if some is None:
            y, weights = y.nan_to_num(1), weights.nan_to_num(1)
        results = []
        for ctas in (1, row_ctas):
            monkeypatch.setattr(combine_norm, "ROW_CTAS", ctas)
            total = residual.clone()
            results.append((total, combine_add_rms_norm(y, weights, total, weight, EPS, ids=some)))
        assert combine_norm_kernel.cache_info().currsize
        for one, other in zip(*results):
            assert torch.equal(one, other)
            assert not one.isnan().any()


# ------------------------------------------------------------------------------------------------- before the experts
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    ("hidden", "num_local", "tile", "granule"),
    [(2048, 128, 8, 8), (4096, 16, 64, 8), (384, 5, 24, 8), (6144, 200, 32, 32)],
)
@pytest.mark.parametrize("num_rows", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("kind", ["a gate's", "any", "one expert", "none"])
def test_a_cta_a_pair_gives_the_places_and_rows_of_few_ctas(
    monkeypatch, kind, num_rows, hidden, num_local, tile, granule, fp8
):
    generator = torch.Generator().manual_seed(num_rows)
    ids = {
        "a gate's": torch.rand(num_rows, max(num_local, 8), generator=generator).argsort(-1)[:, :8],
        "any": torch.randint(-2, num_local + 2, (num_rows, 8), generator=generator),
        "one expert": torch.full((num_rows, 8), num_local - 1),
        "none": torch.full((num_rows, 8), -1),
    }[kind].to(DEVICE, torch.int32)
    x = noise(num_rows, hidden)
    many = torch.full((600,), -1, dtype=torch.int32, device=DEVICE)
    many[3 : 3 + num_local] = torch.arange(num_local, device=DEVICE).flip(0)
    for expert_map in (None, many[: num_local + 3].contiguous(), many):
        results = []
        for most in (0, 64):
            monkeypatch.setattr(permute, "PAIR_A_CTA", most)
            plan, packed, scales = route_and_pack(x, ids, num_local, tile, expert_map, granule=granule, fp8=fp8)
            num_tiles, rows, *_ = plan.state.tolist()
            filled = plan.pair_of_row[:rows]
            used = (filled >= 0).nonzero().flatten()
            of_rows = [packed[:, used], *([] if scales is None else [scales[:, used]])]
            results.append(
                [
                    plan.state,
                    plan.num_tokens_per_expert,
                    plan.tiles[:num_tiles],
                    plan.ready[:num_tiles],
                    filled,
                    *of_rows,
                ]
            )
        for one, other in zip(*results):
            assert torch.equal(one, other)
