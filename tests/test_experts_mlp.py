"""The expert product of a shard: right values, order, and bits that depend on the row and its expert alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from expertmesh.checkpoint import Checkpoint
from expertmesh.errors import EpochError
from expertmesh.experts.mlp import LocalExpertMLP, plan_segments
from expertmesh.make_checkpoint import make_checkpoint
from expertmesh.numerics import MAX_ROWS
from expertmesh.router.placement import Placement, uniform

NUM_EXPERTS, HIDDEN, TOP_K = 16, 32, 4
CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
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
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("experts")
    make_checkpoint(folder, CONFIG, dtype="float32")
    return Checkpoint(folder)


def shard(checkpoint, placement, ep_rank):
    experts = LocalExpertMLP(checkpoint)
    experts.set_placement(placement, ep_rank)
    return experts


@pytest.fixture(scope="module")
def whole(checkpoint):
    return shard(checkpoint, uniform(3, NUM_EXPERTS, 1, moe_layers=(0, 2)), 0)


def naive(checkpoint, layer_id, row, logical):
    def weight(part, shape):
        name = f"model.layers.{layer_id}.mlp.experts.{logical}.{part}_proj.weight"
        return checkpoint.read(name, shape, dtype=torch.float32)

    gate, up, down = weight("gate", (24, HIDDEN)), weight("up", (24, HIDDEN)), weight("down", (HIDDEN, 24))
    return F.linear(F.silu(F.linear(row, gate)) * F.linear(row, up), down)


def random_ids(generator, num_rows, num_slots=NUM_EXPERTS):
    ids = torch.stack([torch.randperm(num_slots, generator=generator)[:TOP_K] for _ in range(num_rows)])
    ids[torch.rand(ids.shape, generator=generator) < 0.2] = -1
    return ids.to(torch.int32)


def test_one_row_per_pair_in_row_major_order(checkpoint, whole):
    generator = torch.Generator().manual_seed(0)
    rows, ids = torch.randn(7, HIDDEN, generator=generator), random_ids(generator, 7)
    out = whole.forward(2, rows, ids)
    want = [naive(checkpoint, 2, rows[r], int(e)) for r in range(7) for e in ids[r] if e >= 0]
    assert out.shape == (len(want), HIDDEN)
    assert torch.allclose(out, torch.stack(want), atol=1e-5)


@pytest.mark.parametrize("num_rows", [1, 3, 8, 40, 200])
def test_a_pair_does_not_depend_on_other_rows(whole, num_rows):
    generator = torch.Generator().manual_seed(num_rows)
    rows, ids = torch.randn(num_rows, HIDDEN, generator=generator), random_ids(generator, num_rows)
    alone = torch.cat([whole.forward(0, rows[r : r + 1], ids[r : r + 1]) for r in range(num_rows)])
    assert torch.equal(whole.forward(0, rows, ids), alone)
    order = torch.randperm(num_rows, generator=generator)
    shuffled = whole.forward(0, rows[order], ids[order])
    again = torch.cat([whole.forward(0, rows[r : r + 1], ids[r : r + 1]) for r in order.tolist()])
    assert torch.equal(shuffled, again)


@pytest.mark.parametrize("num_rows", [MAX_ROWS - 1, MAX_ROWS, MAX_ROWS + 1, 2 * MAX_ROWS + 2])
def test_all_rows_to_one_expert(whole, num_rows):
    rows = torch.randn(num_rows, HIDDEN, generator=torch.Generator().manual_seed(1))
    ids = torch.full((num_rows, TOP_K), -1, dtype=torch.int32)
    ids[:, 2] = 5
    out = whole.forward(0, rows, ids)
    for r in (0, 1, MAX_ROWS - 2, num_rows - 1):
        assert torch.equal(out[r], whole.forward(0, rows[r : r + 1], ids[r : r + 1])[0])


def test_bits_do_not_depend_on_the_number_of_local_experts(checkpoint, whole):
    generator = torch.Generator().manual_seed(3)
    rows, ids = torch.randn(20, HIDDEN, generator=generator), random_ids(generator, 20)
    truth = whole.forward(2, rows, ids)
    pairs = (ids.reshape(-1) >= 0).nonzero().squeeze(1)
    placement = uniform(3, NUM_EXPERTS, 4, 3, moe_layers=(0, 2))
    for ep_rank in range(4):
        part = shard(checkpoint, placement, ep_rank)
        slots = placement.local_slots(2, ep_rank).tolist()
        local = torch.tensor(
            [[slots.index(e) if e in slots and e >= 0 else -1 for e in row] for row in ids.tolist()], dtype=torch.int32
        )
        mine = local.reshape(-1)[pairs] >= 0
        assert torch.equal(part.forward(2, rows, local), truth[mine])


def test_no_rows_and_no_pairs(whole):
    assert whole.forward(0, torch.empty(0, HIDDEN), torch.empty(0, TOP_K, dtype=torch.int32)).shape == (0, HIDDEN)
    none = torch.full((3, TOP_K), -1, dtype=torch.int32)
    assert whole.forward(0, torch.randn(3, HIDDEN), none).shape == (0, HIDDEN)


def test_nan_in_one_row_stays_in_its_own_pairs(whole):
    generator = torch.Generator().manual_seed(4)
    rows, ids = torch.randn(6, HIDDEN, generator=generator), random_ids(generator, 6).clamp_(min=0)
    clean = whole.forward(0, rows, ids).view(6, TOP_K, HIDDEN)
    rows = rows.clone()
    rows[0] = float("nan")
    out = whole.forward(0, rows, ids).view(6, TOP_K, HIDDEN)
    assert out[0].isnan().all()
    assert torch.equal(out[1:], clean[1:])


@pytest.mark.parametrize("min_rows", [1, 4, 16])
def test_segments_hold_every_pair_once_and_stay_in_bounds(min_rows):
    generator = np.random.default_rng(5)
    for _ in range(50):
        ids = generator.integers(-1, 12, size=(generator.integers(1, 90), 8)).astype(np.int32)
        if generator.random() < 0.3:
            ids[generator.random(ids.shape) < 0.9] = 7
            ids = np.repeat(ids, 8, axis=0)
        plan = plan_segments(ids, 12, min_rows)
        assert len(set(plan.result_rows.tolist())) == plan.num_pairs == (ids >= 0).sum()
        pairs = (ids.reshape(-1) >= 0).nonzero()[0]
        assert np.array_equal(plan.source_rows[plan.result_rows], pairs // 8)
        if plan.capacity:
            assert len(plan.source_rows) == 12 * plan.capacity
            owner = plan.result_rows // plan.capacity
        else:
            assert all(min_rows <= size <= MAX_ROWS for size in plan.segment_sizes)
            assert sum(plan.segment_sizes) == len(plan.source_rows)
            owner = np.repeat(plan.segment_slots, plan.segment_sizes)[plan.result_rows]
        assert np.array_equal(owner, ids.reshape(-1)[pairs])


def test_new_placement_is_prepared_beside_the_old_and_shares_what_stays(checkpoint):
    first = uniform(3, NUM_EXPERTS, 2, moe_layers=(0, 2))
    experts = shard(checkpoint, first, 0)
    table = first.physical_to_logical.clone()
    table[2, :8] = torch.arange(8, 16)  # layer 2 changes sides, layer 0 stays
    table[2, 8:] = torch.arange(0, 8)
    second = Placement(2, NUM_EXPERTS, 2, table)
    generator = torch.Generator().manual_seed(6)
    rows, ids = torch.randn(5, HIDDEN, generator=generator), random_ids(generator, 5, 8)
    before = experts.forward(2, rows, ids)
    bytes_before = experts.resident_bytes
    experts.set_placement(second, 0)
    experts.set_placement(second, 0)
    assert torch.equal(experts.forward(2, rows, ids), before)
    assert experts.resident_bytes == bytes_before * 3 // 2
    experts.use_placement(2)
    assert experts.resident_bytes == bytes_before
    other = shard(checkpoint, second, 0)
    assert torch.equal(experts.forward(2, rows, ids), other.forward(2, rows, ids))
    assert not torch.equal(experts.forward(2, rows, ids), before)


def test_a_wider_table_with_the_same_experts_copies_nothing(checkpoint):
    """A death widens the table of those that stay; no expert may be copied while the streams wait."""
    experts = LocalExpertMLP(checkpoint)
    narrow = uniform(checkpoint.config.num_layers, NUM_EXPERTS, 1, moe_layers=checkpoint.config.moe_layer_ids)
    experts.set_placement(narrow, 0)
    before = experts.resident_bytes
    table = torch.nn.functional.pad(narrow.physical_to_logical, (0, 5), value=-1)
    experts.set_placement(Placement(2, NUM_EXPERTS, 1, table), 0)
    assert experts.resident_bytes == before
    experts.use_placement(2)


def test_unprepared_placement_is_refused(checkpoint):
    experts = shard(checkpoint, uniform(3, NUM_EXPERTS, 2, moe_layers=(0, 2)), 1)
    with pytest.raises(EpochError, match="not resident"):
        experts.use_placement(9)
