"""The placement planner: valid, copies apart, moves bounded, deterministic, balanced by its own load model."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.bench.eplb import VARIANTS, Figures, dealt, digest, goal, ours
from expertmesh.bench.eplb_loads import LOADS, SCENARIOS
from expertmesh.errors import EpochError
from expertmesh.experts.eplb import (
    EplbConfig,
    blend,
    capacity,
    logical_loads,
    min_shards,
    plan,
    predict,
)
from expertmesh.experts.placing import eplb_place, plan_for_members
from expertmesh.router.epoch import Epoch, Member
from expertmesh.router.placement import uniform


def zipf(num_layers, num_logical, exponent, seed):
    rng = np.random.default_rng(seed)
    weight = 1.0 / np.arange(1, num_logical + 1) ** exponent
    return np.stack([rng.permutation(weight) for _ in range(num_layers)]) * 1000


@st.composite
def worlds(draw):
    """(loads, hosts, config) with room for one copy of every expert."""
    num_layers, num_logical = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    ep_size = draw(st.integers(1, 6))
    load = st.floats(0, 1000) | st.sampled_from([0.0, 1.0, 1e6])
    loads = np.array(draw(st.lists(load, min_size=num_layers * num_logical, max_size=num_layers * num_logical)))
    per_host = draw(st.integers(1, 3))
    fewest = -(-num_logical // ep_size)
    config = EplbConfig(
        num_redundant=draw(st.integers(0, 2 * num_logical)),
        max_slots_per_rank=draw(st.sampled_from([0, fewest, fewest + 1])),
        tolerance=draw(st.sampled_from([0.0, 0.05])),
    )
    return loads.reshape(num_layers, num_logical), [f"host{rank // per_host}" for rank in range(ep_size)], config


def held(placement):
    """By layer, by rank: the logical experts in its slots."""
    return [
        [[int(e) for e in placement.local_slots(layer, rank) if e >= 0] for rank in range(placement.ep_size)]
        for layer in placement.moe_layers
    ]


def check_valid(made, loads, hosts, config):
    slots, num_copies, _ = capacity(loads.shape[1], len(hosts), config)
    placement = made.placement
    assert placement.ep_size == len(hosts)
    assert placement.slots_per_rank == slots
    for ranks in held(placement):
        copies = [expert for rank in ranks for expert in rank]
        assert set(copies) == set(range(loads.shape[1]))
        assert len(copies) <= num_copies
        assert all(len(set(rank)) == len(rank) for rank in ranks), "two copies of one expert on one rank"


def check_moves(made, present, mapping, lost):
    """The moves are exactly what a rank holds now and did not before, from a slot that has it."""
    new = {(m.layer_id, m.to_physical): m for m in made.moves}
    table, before = made.placement.physical_to_logical, present.physical_to_logical
    for layer in made.placement.moe_layers:
        for rank, rank_before in enumerate(mapping):
            had = set(present.local_slots(layer, rank_before).tolist()) if rank_before >= 0 else set()
            for slot, expert in enumerate(made.placement.local_slots(layer, rank).tolist()):
                move = new.pop((layer, rank * made.placement.slots_per_rank + slot), None)
                if expert < 0 or expert in had:
                    assert move is None
                    continue
                assert move is not None
                assert move.logical_id == expert == table[layer, move.to_physical]
                if move.from_physical >= 0:
                    assert before[layer, move.from_physical] == expert
                    assert move.from_physical // present.slots_per_rank not in lost
                else:
                    assert (layer, expert) in made.missing
    assert not new


def same(a, b):
    return a.moves == b.moves and bool((a.placement.physical_to_logical == b.placement.physical_to_logical).all())


@settings(max_examples=25, deadline=None)
@given(worlds())
def test_a_first_placement_is_valid_and_never_worse_than_an_even_one(world):
    loads, hosts, config = world
    made = plan(loads, hosts, config)
    check_valid(made, loads, hosts, config)
    _, num_copies, _ = capacity(loads.shape[1], len(hosts), config)
    even = predict(uniform(*loads.shape, len(hosts), num_copies - loads.shape[1]), loads)
    if len(set(hosts)) in (1, len(hosts)):  # else copies must be on two hosts, which the even one does not ask
        assert (made.after.max_load <= even.max_load * (1 + 1e-9)).all()
    assert same(made, plan(loads, hosts, config))


@settings(max_examples=25, deadline=None)
@given(worlds(), st.randoms(use_true_random=False), st.integers(0, 12))
def test_a_rebalance_keeps_to_its_moves_and_never_makes_a_layer_worse(world, random, max_moves):
    loads, hosts, config = world
    present = plan(loads, hosts, config).placement
    drifted = np.array([random.sample(row.tolist(), len(row)) for row in loads])
    bounded = EplbConfig(
        num_redundant=config.num_redundant, max_slots_per_rank=config.max_slots_per_rank, max_moves=max_moves
    )
    made = plan(drifted, hosts, bounded, present=present, version=2)
    check_valid(made, drifted, hosts, config)
    check_moves(made, present, range(len(hosts)), set())
    assert (made.num_forced, made.missing) == (0, ())
    assert len(made.moves) <= max_moves
    if sum(map(len, held(present)[0])) == capacity(loads.shape[1], len(hosts), config)[1]:  # no copy to bring back
        assert (made.after.max_load <= made.before.max_load * (1 + 1e-9)).all()
    if max_moves == 0:
        assert [list(map(set, ranks)) for ranks in held(made.placement)] == [
            list(map(set, ranks)) for ranks in held(present)
        ]
    assert same(made, plan(drifted, hosts, bounded, present=present, version=2))


@settings(max_examples=25, deadline=None)
@given(worlds(), st.data())
def test_any_change_of_ranks_gives_a_valid_placement_with_sources_for_every_move(world, data):
    loads, hosts, config = world
    present = plan(loads, hosts, config).placement
    staying = data.draw(st.lists(st.integers(0, len(hosts) - 1), unique=True))
    mapping = [*staying, *[-1] * data.draw(st.integers(0 if staying else 1, 3))]
    gone = set(range(len(hosts))) - set(staying)
    lost = data.draw(st.sets(st.sampled_from(sorted(gone)))) if gone else set()
    next_hosts = [hosts[rank] if rank >= 0 else f"new{i}" for i, rank in enumerate(mapping)]
    limits = EplbConfig(num_redundant=config.num_redundant, max_moves=data.draw(st.sampled_from([0, 5, -1])))
    made = plan(loads, next_hosts, limits, present=present, ranks_before=mapping, lost=sorted(lost))
    check_valid(made, loads, next_hosts, limits)
    check_moves(made, present, mapping, lost)
    living = {e for rank in range(len(hosts)) if rank not in lost for e in held(present)[0][rank]}
    assert {e for layer, e in made.missing if layer == 0} == set(range(loads.shape[1])) - living
    if limits.max_moves >= 0:
        assert len(made.moves) <= made.num_forced + limits.max_moves


@settings(max_examples=20, deadline=None)
@given(worlds(), st.data())
def test_with_a_copy_to_spare_for_every_expert_one_death_loses_none(world, data):
    loads, hosts, _ = world
    if len(hosts) < 2:
        return
    config = EplbConfig(num_redundant=loads.shape[1] + data.draw(st.integers(0, 4)))
    present = plan(loads, hosts, config).placement
    dead = data.draw(st.integers(0, len(hosts) - 1))
    mapping = [rank for rank in range(len(hosts)) if rank != dead]
    at_once = EplbConfig(num_redundant=config.num_redundant, max_moves=0)
    left = [hosts[rank] for rank in mapping]
    made = plan(loads, left, at_once, present=present, ranks_before=mapping, lost=[dead])
    assert (made.moves, made.missing) == ((), ())  # served on at once; redundancy comes back with the next plan
    again = plan(loads, left, config, present=made.placement)
    if len(left) > 1:
        assert int(again.placement.logical_replica_count.min()) >= 2


def test_copies_of_one_expert_are_on_two_hosts():
    loads, hosts = zipf(4, 32, 1.2, seed=1), [f"h{rank // 2}" for rank in range(8)]
    for config in (EplbConfig(num_redundant=32), EplbConfig(num_redundant=8)):
        ranks_of = [
            {e: {hosts[rank] for rank, experts in enumerate(ranks) if e in experts} for e in range(32)}
            for ranks in held(plan(loads, hosts, config).placement)
        ]
        copies = plan(loads, hosts, config).placement.logical_replica_count
        for layer, where in enumerate(ranks_of):
            assert all(len(where[e]) >= 2 for e in range(32) if copies[layer, e] > 1)


def test_a_hot_expert_gets_the_spare_copies():
    loads = np.ones((1, 8))
    loads[0, 3] = 100
    made = plan(loads, ["a", "b", "c", "d"], EplbConfig(num_redundant=4), present=uniform(1, 8, 4, 4))
    assert int(made.placement.logical_replica_count[0, 3]) == 4
    assert made.after.max_over_mean < 1.05 < made.before.max_over_mean


def test_a_second_copy_of_each_comes_before_a_third_of_the_hot_ones_unless_told_otherwise():
    loads, hosts = zipf(2, 16, 1.2, seed=5), list("abcdefgh")
    safe, fast = (plan(loads, hosts, EplbConfig(num_redundant=16, min_copies=n)) for n in (0, 1))
    both = plan(loads, hosts, EplbConfig(num_redundant=24))
    assert int(safe.placement.logical_replica_count.min()) == 2
    assert int(both.placement.logical_replica_count.min()) == 2
    assert fast.after.max_over_mean < 1.05 < safe.after.max_over_mean
    assert both.after.max_over_mean < 1.1


def test_a_quiet_or_balanced_layer_moves_nothing():
    loads = np.stack([np.zeros(16), np.ones(16)])
    made = plan(loads, ["a"] * 4, EplbConfig(num_redundant=4, tolerance=0.3), present=uniform(2, 16, 4, 4))
    assert made.moves == ()


def test_a_newcomer_takes_over_experts_and_a_drained_rank_gives_its_own_away():
    loads, hosts = zipf(3, 16, 1.0, seed=2), ["a", "b"]
    first = plan(loads, hosts, EplbConfig()).placement
    joined = plan(loads, [*hosts, "c"], EplbConfig(), present=first, ranks_before=[0, 1, -1], version=2)
    assert all(ranks[2] for ranks in held(joined.placement))
    assert joined.predicted_gain > 1.3
    drained = plan(loads, ["b", "c"], EplbConfig(), present=joined.placement, ranks_before=[1, 2], version=3)
    assert not drained.missing
    assert all(move.from_physical >= 0 for move in drained.moves)
    killed = plan(loads, ["b", "c"], EplbConfig(), present=joined.placement, ranks_before=[1, 2], lost=[0], version=3)
    assert set(killed.missing) == {
        (layer, e) for layer, ranks in zip(first.moe_layers, held(joined.placement)) for e in ranks[0]
    }
    assert killed.before is None
    assert killed.num_forced > 0


def test_experts_that_do_not_fit_are_refused_with_the_number_that_would():
    with pytest.raises(EpochError, match="8 ranks are needed"):
        plan(np.ones((1, 32)), ["a", "b"], EplbConfig(max_slots_per_rank=4))
    assert (min_shards(32, 4), min_shards(32, 0)) == (8, 1)


def test_dense_layers_stay_empty():
    made = plan(np.ones((4, 8)), ["a", "b"], EplbConfig(), moe_layers=[1, 3])
    assert made.placement.moe_layers == (1, 3)
    assert plan(np.ones((4, 8)), ["a", "b"], EplbConfig(), present=made.placement).placement.moe_layers == (1, 3)


def test_members_keep_their_experts_when_their_rank_changes():
    def member(name):
        return Member(member_id=name, attention=name[0] == "a", expert=name[0] == "e", host=name)

    config = EplbConfig(num_redundant=8)
    loads = zipf(2, 8, 1.2, seed=3)
    members = [member(name) for name in ("e1", "e2", "e3")]
    first = plan(loads, [m.host for m in members], config).placement
    before = Epoch(number=1, members=(member("a1"), *members), placement=first)
    made = plan_for_members(
        loads, [member("e3"), member("e2")], EplbConfig(num_redundant=8, max_moves=0),
        version=2, before=before, lost=frozenset({"e1"}),
    )  # fmt: skip
    for layer in range(2):
        for rank, rank_before in ((0, 2), (1, 1)):
            assert set(held(made.placement)[layer][rank]) >= set(held(first)[layer][rank_before])
    assert made.missing == ()


def test_the_next_epoch_after_a_death_waits_for_no_move_and_a_newcomer_gets_its_share():
    def members(*names):
        return tuple(Member(member_id=name, attention=False, expert=True, host=name) for name in names)

    loads = zipf(2, 8, 1.2, seed=4)
    place = eplb_place(2, 8, EplbConfig(num_redundant=8), lambda: loads)
    first = place(1, members("e1", "e2", "e3"), None)
    dead = place(2, members("e2", "e3"), Epoch(number=1, members=members("e1", "e2", "e3"), placement=first))
    for layer in range(2):
        assert set(held(dead)[layer][0]) <= set(held(first)[layer][1])
    joined = place(3, members("e2", "e3", "e4"), Epoch(number=2, members=members("e2", "e3"), placement=dead))
    assert all(len(ranks[2]) >= 2 for ranks in held(joined))
    assert int(joined.logical_replica_count.min()) >= 2
    assert joined.version == 3
    assert eplb_place(3, 0, EplbConfig(), lambda: None, moe_layers=())(1, (), None).ep_size == 1  # a dense model


def test_the_load_model_predicts_what_dispatch_deals():
    gain = dealt(num_layers=2, num_logical=64, num_tokens=4000)
    assert gain["predicted_gain"] > 1.3
    assert gain["dealt_gain"] == pytest.approx(gain["predicted_gain"], rel=0.05)


def test_recorded_tasks_are_balanced_as_by_the_published_balancer_with_fewer_moves():
    recorded = json.loads((LOADS / "reference.json").read_text())["scenarios"]
    for scenario in SCENARIOS:
        known, windows = dict(recorded[scenario.name]), scenario.windows()
        assert known.pop("loads") == digest(windows), "the figures belong to other loads"
        if scenario.name.startswith("demo"):
            exact, faults = ours(scenario, windows, VARIANTS["exact"])
            assert not faults
            assert goal({"DeepSeek EPLB": Figures(**known), "exact": exact}) == "met"


def test_loads_of_slots_become_loads_of_experts_and_blend_by_proportion():
    placement = uniform(2, 4, 2, 2)
    rows = np.arange(placement.physical_to_logical.numel()).reshape(2, -1)
    assert logical_loads(placement, rows).sum() == rows[placement.physical_to_logical.numpy() >= 0].sum()
    history = np.array([[30.0, 10.0], [1.0, 1.0]])
    assert blend(history, None) is not None
    mixed = blend([[0, 4], [0, 0]], history, weight=0.5)
    assert mixed.tolist() == [[15.0, 25.0], [1.0, 1.0]]  # 4 rows weigh as much as 40 did; a silent layer stays


@pytest.mark.parametrize("bad", [np.full((1, 4), np.nan), np.full((1, 4), -1.0)])
def test_senseless_loads_are_refused(bad):
    with pytest.raises(EpochError, match="finite"):
        plan(bad, ["a"], EplbConfig())
