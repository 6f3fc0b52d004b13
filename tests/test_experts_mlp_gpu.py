"""The expert tier's product on a GPU: what the CPU's path gives, without a host sync, while placements change."""

import pytest
import torch

from expertmesh.checkpoint import Checkpoint
from expertmesh.experts.mlp import LocalExpertMLP
from expertmesh.make_checkpoint import make_checkpoint
from expertmesh.numerics import Numerics
from expertmesh.router.placement import Placement, uniform

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
DEVICE = "cuda"
NUM_EXPERTS, HIDDEN, TOP_K, LAYERS = 16, 256, 4, (0, 2)
CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "mlp_only_layers": [1],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    make_checkpoint(folder, CONFIG, dtype="bfloat16")
    return Checkpoint(folder)


def shard(checkpoint, placement, ep_rank=0, **changes):
    experts = LocalExpertMLP(checkpoint, **{"dtype": torch.bfloat16, "device": DEVICE, **changes})
    experts.set_placement(placement, ep_rank)
    return experts


@pytest.fixture(scope="module")
def expected(checkpoint):
    """layer, rows, logical ids -> [pairs, hidden] by the path of the CPU in float32 on the same weights."""
    whole = LocalExpertMLP(checkpoint, Numerics())
    whole.set_placement(uniform(3, NUM_EXPERTS, 1, moe_layers=LAYERS), 0)
    return lambda layer_id, rows, ids: whole.forward(layer_id, rows.float().cpu(), ids.cpu())


def table(version, slots, ep_size=2):
    """Rank 0 holds `slots` in every MoE layer, the other rank everything."""
    width = max(len(slots), NUM_EXPERTS)
    row = [*slots, *[-1] * (width - len(slots)), *range(NUM_EXPERTS), *[-1] * (width - NUM_EXPERTS)]
    physical = torch.full((3, 2 * width), -1, dtype=torch.int32)
    for layer_id in LAYERS:
        physical[layer_id] = torch.tensor(row, dtype=torch.int32)
    return Placement(version, NUM_EXPERTS, ep_size, physical)


def draw(seed, num_rows, num_slots):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, HIDDEN, generator=generator).bfloat16().to(DEVICE)
    slots = torch.rand(num_rows, max(num_slots, TOP_K), generator=generator).argsort(-1)[:, :TOP_K].to(torch.int32)
    slots[(torch.rand(slots.shape, generator=generator) < 0.3) | (slots >= num_slots)] = -1
    return rows, slots.to(DEVICE)


def relative_error(got, expected):
    got, expected = got.double().cpu(), expected.double().cpu()
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("layer_id", LAYERS)
@pytest.mark.parametrize("num_rows", [1, 5, 70, 700])
def test_pairs_are_what_the_cpu_gives(checkpoint, expected, layer_id, num_rows):
    experts = shard(checkpoint, uniform(3, NUM_EXPERTS, 1, moe_layers=LAYERS))
    rows, slots = draw(num_rows, num_rows, NUM_EXPERTS)
    every = experts.forward(layer_id, rows, slots)
    assert every.shape == (num_rows, TOP_K, HIDDEN)
    wanted = expected(layer_id, rows, slots)
    assert relative_error(every[slots >= 0], wanted) < 1e-2
    compact = experts.forward(layer_id, rows, slots.cpu())  # the host knows the ids: pairs alone
    assert torch.equal(compact, every[slots >= 0])
    assert experts.forward(layer_id, rows[:0], slots[:0]).shape == (0, TOP_K, HIDDEN)


def test_a_graph_captured_once_follows_ids_and_placements(checkpoint, expected):
    held = [(3, 1, 4, 15, 9), (4, 8, 3, 1, 9), (8, 9, 2, -1, 2)]
    placements = [table(version + 1, slots) for version, slots in enumerate(held)]
    experts = shard(checkpoint, placements[0])
    rows, slots = draw(1, 40, 5)
    experts.forward(2, rows, slots)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a wait for the device in there would be an error
        out = experts.forward(2, rows, slots)
    for version, logical in enumerate(held):
        experts.set_placement(placements[version], 0)
        experts.use_placement(version + 1)
        assert experts.graph_version == 0
        for seed in (5, 6):
            new_rows, new_slots = draw(10 * version + seed, 40, 5)
            rows.copy_(new_rows)
            slots.copy_(new_slots)
            graph.replay()
            named = torch.tensor([*logical, -1], dtype=torch.int32, device=DEVICE)[slots.long()]
            assert relative_error(out[named >= 0], expected(2, rows, named)) < 1e-2


def test_an_older_placement_serves_while_a_newer_one_loads(checkpoint, expected):
    experts = shard(checkpoint, table(1, (0, 1, 2, 3)))
    rows, slots = draw(3, 64, 4)
    before = experts.forward(0, rows, slots)
    experts.set_placement(table(2, (4, 1, 5, 3)), 0)
    assert torch.equal(experts.forward(0, rows, slots)[slots >= 0], before[slots >= 0])
    experts.use_placement(2)
    named = torch.tensor([4, 1, 5, 3, -1], dtype=torch.int32, device=DEVICE)[slots.long()]
    assert relative_error(experts.forward(0, rows, slots)[slots >= 0], expected(0, rows, named)) < 1e-2


def test_nothing_in_forward_waits_for_the_device(checkpoint):
    experts = shard(checkpoint, uniform(3, NUM_EXPERTS, 2, moe_layers=LAYERS))
    rows, slots = draw(4, 33, 8)
    experts.forward(0, rows, slots)
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts.forward(0, rows, slots)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_the_kernels_do_not_take_runs_in_torch_and_is_said(checkpoint, expected, caplog):
    with caplog.at_level("WARNING"):
        experts = shard(checkpoint, uniform(3, NUM_EXPERTS, 1, moe_layers=LAYERS), dtype=torch.float32)
    assert any("plain torch" in r.message and "float32" in r.message for r in caplog.records)
    rows, slots = draw(8, 20, NUM_EXPERTS)
    assert relative_error(experts.forward(0, rows.float(), slots), expected(0, rows, slots)) < 1e-4
