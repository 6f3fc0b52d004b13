"""One token's experts in one launch, on a GPU: the rows that route, pack and the products give, bit for bit; the state
is left as it was; the same work is noted."""

import pytest
import torch

from expertmesh.kernels import expert_layer
from expertmesh.kernels.expert_layer import ExpertLayer
from expertmesh.kernels.expert_work import ExpertWork

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs packed weights for wgmma", allow_module_level=True)
DEVICE = "cuda"
SHAPES = (
    (2048, 768, 16, 8),
    (4096, 1536, 8, 8),
    (2048, 768, 128, 8),
    (256, 64, 5, 4),
    (512, 320, 6, 32),
    (6144, 2560, 4, 8),
)


def layer_of(hidden, intermediate, num_local, seed=0):
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    w13 = torch.randn(num_local, 2 * intermediate, hidden, device=DEVICE, generator=generator) * 0.05
    w2 = torch.randn(num_local, hidden, intermediate, device=DEVICE, generator=generator) * 0.05
    return ExpertLayer(w13.bfloat16(), w2.bfloat16(), kernels="cuda")


def ids_of(num_local, top_k):
    """name -> ids [1, top_k]"""
    generator = torch.Generator().manual_seed(num_local)
    kinds = {
        "a gate's": torch.rand(max(num_local, top_k), generator=generator).argsort()[:top_k],
        "any": torch.randint(-2, num_local + 2, (top_k,), generator=generator),
        "one pair": torch.where(torch.arange(top_k) == top_k - 1, num_local - 1, -1),
        "one expert": torch.full((top_k,), num_local - 1),
        "none": torch.full((top_k,), -1),
    }
    return {name: ids[None].to(DEVICE, torch.int32) for name, ids in kinds.items()}


def both(monkeypatch, layer, x, ids, **options):
    """The rows by separate launches and by one."""
    made = []
    for most in (0, 1):
        monkeypatch.setattr(expert_layer, "THIN_TOKENS", most)
        out = torch.full((1, ids.shape[1], layer.hidden_size), 7.0, dtype=torch.bfloat16, device=DEVICE)
        made.append(layer.rows(x, ids, out=out, **options))
    assert not layer.thin_state.any()
    return made


@pytest.mark.parametrize(("hidden", "intermediate", "num_local", "top_k"), SHAPES)
def test_one_launch_gives_the_rows_of_separate_ones(monkeypatch, hidden, intermediate, num_local, top_k):
    layer = layer_of(hidden, intermediate, num_local)
    expert_map = torch.full((num_local + 9,), -1, dtype=torch.int32, device=DEVICE)
    expert_map[4 : 4 + num_local] = torch.arange(num_local, device=DEVICE).flip(0)
    for i, (name, ids) in enumerate(ids_of(num_local, top_k).items()):
        x = torch.randn(1, hidden, device=DEVICE, generator=torch.Generator(device=DEVICE).manual_seed(i)).bfloat16()
        for options in ({}, {"expert_map": expert_map}):
            separate, one = both(monkeypatch, layer, x, ids, **options)
            assert torch.equal(separate, one), (name, options.keys(), (separate.float() - one.float()).abs().max())
    x[0, 3] = float("nan")
    separate, one = both(monkeypatch, layer, x, ids_of(num_local, top_k)["a gate's"])
    assert torch.equal(separate.isnan(), one.isnan())


def test_a_hundred_replays_of_layers_in_a_row_give_the_same_bits(monkeypatch):
    layers = [layer_of(2048, 768, 16, seed=n) for n in range(3)]
    ids = ids_of(16, 8)["a gate's"]
    first = torch.randn(1, 2048, device=DEVICE).bfloat16()

    def run(most):
        monkeypatch.setattr(expert_layer, "THIN_TOKENS", most)
        x, made = first, []
        for layer in layers:
            made.append(layer.rows(x, ids))
            x = made[-1][:, 0].contiguous() * 0.1
        return made

    expected = run(0)
    run(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run(1)
    for _ in range(100):
        for rows in made:
            rows.zero_()
        graph.replay()
        for rows, wanted in zip(made, expected):
            assert torch.equal(rows, wanted)


def test_the_same_work_is_noted(monkeypatch):
    layer, ids = layer_of(2048, 768, 16), ids_of(16, 8)["any"]
    x, noted = torch.randn(1, 2048, device=DEVICE).bfloat16(), []
    for most in (0, 1):
        monkeypatch.setattr(expert_layer, "THIN_TOKENS", most)
        work = ExpertWork(1, torch.device(DEVICE))
        work.count_for(1)
        for _ in range(3):
            layer.rows(x, ids, work=work.of(0))
        torch.cuda.synchronize()
        noted.append(work.rows(1))
        assert 2e-6 < work.busy_s() < 1e-3
        layer.rows(x, torch.full_like(ids, -1), work=work.of(0))
        torch.cuda.synchronize()
        assert (work.rows(1) == noted[-1]).all()
    assert (noted[0] == noted[1]).all()
