"""Placement tables: derived from one another, checked, carried as bytes."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.errors import EpochError
from expertmesh.router.placement import Placement, uniform


@st.composite
def placements(draw):
    """Any valid table: every expert of a MoE layer at least once, the rest copies and holes."""
    num_logical, ep_size = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    slots = -(-num_logical // ep_size) + draw(st.integers(0, 3))
    num_layers, seed = draw(st.integers(1, 4)), draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    table = torch.full((num_layers, ep_size * slots), -1, dtype=torch.int32)
    for layer_id in range(num_layers):
        if torch.rand(1, generator=generator) < 0.2:
            continue  # a dense layer
        extra = torch.randint(-1, num_logical, (ep_size * slots - num_logical,), generator=generator)
        row = torch.cat([torch.arange(num_logical), extra])
        table[layer_id] = row[torch.randperm(len(row), generator=generator)].to(torch.int32)
    return Placement(draw(st.integers(0, 2**40)), num_logical, ep_size, table)


@given(placements())
@settings(max_examples=100, deadline=None)
def test_logical_and_physical_tables_agree(placement):
    for layer_id in range(placement.num_layers):
        physical = placement.physical_to_logical[layer_id].tolist()
        for logical in range(placement.num_logical_experts):
            copies = [p for p, held in enumerate(physical) if held == logical]
            row = placement.logical_to_physical[layer_id, logical].tolist()
            assert row == copies + [-1] * (len(row) - len(copies))
            assert placement.logical_replica_count[layer_id, logical] == len(copies)
        assert (layer_id in placement.moe_layers) == any(held >= 0 for held in physical)


@given(placements(), st.integers(0, 2**20))
@settings(max_examples=100, deadline=None)
def test_a_token_goes_to_a_copy_of_its_expert_the_same_for_the_same_key(placement, seed):
    generator = torch.Generator().manual_seed(seed)
    num_tokens = int(torch.randint(0, 6, (1,), generator=generator))
    key = torch.randint(0, 1000, (num_tokens,), generator=generator)
    for layer_id in placement.moe_layers:
        ids = torch.randint(-1, placement.num_logical_experts, (num_tokens, 3), generator=generator, dtype=torch.int32)
        mapped = placement.map_to_physical(layer_id, ids, key)
        assert (mapped.shape, mapped.dtype) == (ids.shape, torch.int32)
        held = placement.physical_to_logical[layer_id]
        assert [held[p] if p >= 0 else -1 for p in mapped.flatten().tolist()] == ids.flatten().tolist()
        assert placement.map_to_physical(layer_id, ids.flip(0), key.flip(0)).flip(0).equal(mapped)


def test_all_copies_of_a_hot_expert_are_used():
    placement = uniform(1, 4, 4, num_redundant=12)
    ids, key = torch.zeros(8, 1, dtype=torch.int32), torch.arange(8)
    counts = placement.map_to_physical(0, ids, key).flatten().bincount()
    assert counts[counts > 0].tolist() == [2, 2, 2, 2]


@given(placements())
@settings(max_examples=50, deadline=None)
def test_bytes_and_pickle_give_the_same_placement(placement):
    for other in (Placement.decode(placement.encode()), pickle.loads(pickle.dumps(placement))):
        assert (other.version, other.ep_size, other.moe_layers) == (
            placement.version,
            placement.ep_size,
            placement.moe_layers,
        )
        assert other.physical_to_logical.equal(placement.physical_to_logical)
        assert other.logical_to_physical.equal(placement.logical_to_physical)


@pytest.mark.parametrize("data", [b"", b"EMP1", b"XXXX" + bytes(40), uniform(2, 4, 2).encode()[:-1]])
def test_broken_bytes_are_refused(data):
    with pytest.raises(EpochError):
        Placement.decode(data)


@pytest.mark.parametrize(
    ("num_logical", "ep_size", "num_redundant"), [(8, 1, 0), (128, 4, 0), (10, 4, 0), (8, 2, 8), (128, 3, 5)]
)
def test_uniform_spreads_evenly_and_copies_live_on_other_ranks(num_logical, ep_size, num_redundant):
    placement = uniform(3, num_logical, ep_size, num_redundant, moe_layers=[0, 2])
    assert placement.moe_layers == (0, 2)
    held = [placement.local_slots(0, rank) for rank in range(ep_size)]
    sizes = [int((h >= 0).sum()) for h in held]
    assert sum(sizes) == num_logical + num_redundant
    assert max(sizes) - min(sizes) <= 1
    assert placement.slots_per_rank == max(sizes)
    for h in held:
        own = h[h >= 0].tolist()
        assert len(set(own)) == len(own), "a rank holds an expert twice"


def test_a_dense_model_has_no_moe_layers():
    assert uniform(3, 0, 1, moe_layers=()).moe_layers == ()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[0, 1, 1]], "shape"),
        ([[0, 1, 4, 2]], "logical ids"),
        ([[0, -2, 1, 2]], "logical ids"),
        ([[0, 1, 1, -1]], "expert 2 of layer 0 has no physical copy"),
        ([[-1, -1, -1, -1], [2, 1, -1, 1]], "expert 0 of layer 1"),
    ],
)
def test_an_impossible_table_is_refused(table, message):
    with pytest.raises(EpochError, match=message):
        Placement(1, 3, 2, torch.tensor(table))
