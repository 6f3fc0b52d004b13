"""Before and behind the experts at few tokens, on a GPU: launches of more CTAs give the bits of those of fewer."""

import pytest
import torch

from expertmesh.kernels import combine_norm, permute
from expertmesh.kernels.combine_norm import combine_add_rms_norm
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


def noise(*shape, seed=0, scale=1.0):
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    return (torch.randn(shape, device=DEVICE, generator=generator) * scale).to(BF16)


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
        for most_pairs in (0, 64):
            monkeypatch.setattr(permute, "PAIR_A_CTA", most_pairs)
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
