"""The plan of one layer against a loop that anybody can read."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.router.dispatch import plan
from expertmesh.router.exchange import weighted_sum
from expertmesh.router.placement import Placement, uniform


@st.composite
def routings(draw):
    num_logical, ep_size = draw(st.integers(1, 12)), draw(st.sampled_from([1, 2, 3, 4]))
    redundant = draw(st.integers(0, 8))
    num_tokens, top_k = draw(st.integers(0, 20)), draw(st.integers(1, min(4, num_logical)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    placement = uniform(2, num_logical, ep_size, redundant)
    order = torch.randperm(placement.num_physical_experts, generator=generator)
    placement = Placement(2, num_logical, ep_size, placement.physical_to_logical[:, order])
    ids = torch.rand(num_tokens, num_logical, generator=generator).argsort(1)[:, :top_k].to(torch.int32)
    ids[torch.rand(num_tokens, top_k, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -1
    return placement, ids, draw(st.integers(0, 3))


def naive(ids, placement, source_rank):
    """-> for each rank: {token: [slot or -1 per k]} in token order."""
    slots = placement.slots_per_rank
    key = torch.arange(source_rank, source_rank + ids.shape[0])
    physical = placement.map_to_physical(1, ids, key).tolist()
    needs = [{} for _ in range(placement.ep_size)]
    for token, row in enumerate(physical):
        for k, p in enumerate(row):
            if p >= 0:
                needs[p // slots].setdefault(token, [-1] * len(row))[k] = p % slots
    return needs


@given(routings())
@settings(max_examples=300, deadline=None)
def test_plan_equals_the_naive_loop(routing):
    placement, ids, source_rank = routing
    made = plan(ids, placement, 1, source_rank)
    needs = naive(ids, placement, source_rank)
    if placement.ep_size == 1:  # the rows are the batch itself, needed or not
        needs = [{t: needs[0].get(t, [-1] * ids.shape[1]) for t in range(ids.shape[0])}]
    assert made.send_counts == [len(n) for n in needs]
    assert made.row_to_token.tolist() == [token for n in needs for token in n]
    assert made.row_slot_ids.tolist() == [slot_ids for n in needs for slot_ids in n.values()]
    pairs = [[(t, k) for t, row in n.items() for k, slot in enumerate(row) if slot >= 0] for n in needs]
    assert made.pair_counts == [len(p) for p in pairs]
    assert made.return_slots.tolist() == [t * ids.shape[1] + k for p in pairs for t, k in p]
    assert sorted(made.return_slots.tolist()) == (ids.flatten() >= 0).nonzero().flatten().tolist()
    assert (made.num_tokens, made.top_k, made.layer_id) == (*ids.shape, 1)


@given(routings(), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=100, deadline=None)
def test_weighted_sum_is_the_sum_in_topk_order(routing, dtype):
    """Bit for bit, and whatever the ranks: a float32 sum from k = 0 on, then the rows' dtype."""
    placement, ids, source_rank = routing
    num_tokens, top_k = ids.shape
    made = plan(ids, placement, 1, source_rank)
    generator = torch.Generator().manual_seed(num_tokens)
    by_slot = torch.randn(num_tokens * top_k, 16, generator=generator).to(dtype)
    weights = torch.rand(num_tokens, top_k, generator=generator)
    summed = weighted_sum(by_slot[torch.from_numpy(made.return_slots)], made, weights)
    assert (summed.shape, summed.dtype) == ((num_tokens, 16), dtype)
    for token in range(num_tokens):
        total = torch.zeros(16)
        for k in range(top_k):
            if ids[token, k] >= 0:
                total = total + by_slot[token * top_k + k].float() * weights[token, k]
        assert summed[token].equal(total.to(dtype))


def test_a_large_batch_sums_to_the_bits_of_its_parts():
    """The chunks of a prefill give the bits that each token gets alone."""
    generator = torch.Generator().manual_seed(0)
    num_tokens, top_k, hidden = 300, 8, 512
    placement = uniform(1, 32, 3)
    ids = torch.rand(num_tokens, 32, generator=generator).argsort(1)[:, :top_k].to(torch.int32)
    by_slot = torch.randn(num_tokens * top_k, hidden, generator=generator)
    weights = torch.rand(num_tokens, top_k, generator=generator)
    made = plan(ids, placement, 0)
    together = weighted_sum(by_slot[torch.from_numpy(made.return_slots)], made, weights)
    for token in (0, 1, 127, 128, 299):
        alone = plan(ids[token : token + 1], placement, 0)
        rows = by_slot[token * top_k : (token + 1) * top_k][torch.from_numpy(alone.return_slots)]
        assert weighted_sum(rows, alone, weights[token : token + 1])[0].equal(together[token])
