"""The experts of a rank in one device's memory: placements change under running steps. On a CPU, in plain torch."""

import pytest
import torch

from expertmesh.checkpoint import Checkpoint
from expertmesh.experts.device_experts import DeviceExperts, expected_pairs
from expertmesh.experts.mlp import LocalExpertMLP
from expertmesh.make_checkpoint import make_checkpoint
from expertmesh.numerics import Numerics
from expertmesh.router.placement import uniform

NUM_EXPERTS, HIDDEN, TOP_K = 12, 32, 3
CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    make_checkpoint(folder, CONFIG, dtype="float32")
    return Checkpoint(folder)


class Counting(DeviceExperts):
    """Remembers which experts came from disk."""

    def _load(self, layer_id, logical_ids, meter):
        self.loaded = [*getattr(self, "loaded", []), *logical_ids]
        return super()._load(layer_id, logical_ids, meter)


@pytest.fixture
def experts(checkpoint):
    return Counting(checkpoint, dtype=torch.float32, device=torch.device("cpu"), num_spare=2, kernels="torch")


@pytest.fixture(scope="module")
def expected(checkpoint):
    """rows, logical ids -> [R, top_k, hidden] by the path of the CPU; zero where an id is -1."""
    whole = LocalExpertMLP(checkpoint, Numerics())
    whole.set_placement(uniform(1, NUM_EXPERTS, 1), 0)

    def rows_of(rows, ids):
        out = torch.zeros(*ids.shape, HIDDEN)
        out[ids >= 0] = whole.forward(0, rows, ids)
        return out

    return rows_of


def agrees(experts, placed, expected, seed=0):
    """Every slot of this placement multiplies by the expert that the placement names."""
    generator = torch.Generator().manual_seed(seed)
    num_slots = len(placed.logical_ids)
    rows = torch.randn(20, HIDDEN, generator=generator)
    slots = torch.randint(-1, num_slots, (20, TOP_K), generator=generator, dtype=torch.int32)
    logical = torch.tensor([*placed.logical_ids, -1], dtype=torch.int32)[slots.long()]
    got = experts.rows(0, rows, slots)
    return torch.allclose(got[logical >= 0], expected(rows, logical)[logical >= 0], atol=1e-5)


def test_slots_read_their_experts_and_empty_slots_none(experts, expected):
    placed = experts.place(0, (5, -1, 0, 11, 5), [])
    experts.use({0: placed})
    assert agrees(experts, placed, expected)
    assert experts.loaded == [0, 5, 11]  # a second copy in the layer costs neither memory nor a read
    out = experts.rows(0, torch.randn(1, HIDDEN), torch.tensor([[1, -1, 1]], dtype=torch.int32))
    assert not out.any()


def test_a_rebalance_loads_what_is_missing_and_moves_no_address(experts, expected):
    first = experts.place(0, (0, 1, 2, 3), [])
    experts.use({0: first})
    table, weights = experts._maps[0], first.pool.layer.natural[0]
    second = experts.place(0, (3, 7, 1, 0), [first])
    assert agrees(experts, first, expected)  # the older version serves until the newer is entered
    experts.use({0: second})
    assert agrees(experts, second, expected)
    assert experts.loaded == [0, 1, 2, 3, 7]
    assert second.pool is first.pool
    assert experts._maps[0].data_ptr() == table.data_ptr()
    assert second.pool.layer.natural[0].data_ptr() == weights.data_ptr()
    assert experts.graph_version == 0


def test_an_expert_that_left_is_taken_back_without_a_read_while_its_place_is_free(experts, expected):
    first = experts.place(0, (0, 1), [])
    experts.use({0: first})
    second = experts.place(0, (0, 2), [first])
    experts.use({0: second})
    third = experts.place(0, (1, 2), [second])
    experts.use({0: third})
    assert agrees(experts, third, expected)
    assert experts.loaded == [0, 1, 2]


def test_two_versions_in_waiting_do_not_take_each_others_places(experts, expected):
    first = experts.place(0, (0, 1), [])
    experts.use({0: first})
    second = experts.place(0, (2, 1), [first])
    third = experts.place(0, (3, 0), [first, second])
    for placed in (first, second, third):
        experts.use({0: placed})
        assert agrees(experts, placed, expected)
    assert experts.graph_version == 0


def test_more_changes_than_free_places_take_a_new_pool_and_say_so(experts, expected):
    first = experts.place(0, (0, 1, 2, 3), [])
    experts.use({0: first})
    second = experts.place(0, (4, 5, 6, 3), [first])
    assert agrees(experts, first, expected)
    experts.use({0: second})
    assert second.pool is not first.pool
    assert agrees(experts, second, expected)
    assert experts.loaded == [0, 1, 2, 3, 4, 5, 6]  # what the old pool holds is copied
    assert experts.graph_version == 1


def test_more_slots_than_before_are_a_new_table_and_fewer_are_not(experts, expected):
    for ids, version in (((0, 1, 2), 0), ((2, 1), 0), ((1, 2, 0, 3), 1)):
        placed = experts.place(0, ids, [] if ids == (0, 1, 2) else [placed])  # noqa: F821
        experts.use({0: placed})
        assert agrees(experts, placed, expected)
        assert experts.graph_version == version


def test_a_rank_without_experts_holds_a_table_of_nothing(experts, expected):
    placed = experts.place(0, (-1, -1), [])
    experts.use({0: placed})
    assert agrees(experts, placed, expected)


def test_rows_are_counted_for_each_slot_of_the_placement_in_use(experts):
    first = experts.place(0, (5, -1, 0, 11, 5), [])
    experts.use({0: first}, 1)
    slots = torch.tensor([[0, 2, -1], [3, 4, 0], [1, -1, -1]], dtype=torch.int32)
    experts.rows(0, torch.randn(3, HIDDEN), slots)
    experts.rows(0, torch.randn(3, HIDDEN), slots)
    assert experts.rows_per_slot({0: first}, 1).tolist() == [[6, 0, 2, 2, 0]]  # slot 4 is slot 0's expert
    second = experts.place(0, (11, 7), [first])
    assert experts.rows_per_slot({0: second}, 2).tolist() == [[0, 0]]
    experts.use({0: second}, 2)
    assert experts.rows_per_slot({0: first}, 1).sum() == 0
    experts.rows(0, torch.randn(1, HIDDEN), torch.tensor([[1, 0, 1]], dtype=torch.int32))
    assert experts.rows_per_slot({0: second}, 2).tolist() == [[1, 2]]
    assert experts.work.busy_s() > 0


@pytest.mark.parametrize(("ep_size", "expected_of_one_row"), [(1, 8.0), (2, 4.0157), (16, 1.2407)])
def test_expected_pairs_count_rows_that_were_sent_for_a_reason(ep_size, expected_of_one_row):
    assert expected_pairs(10, 8, ep_size) == pytest.approx(10 * expected_of_one_row, rel=1e-3)
