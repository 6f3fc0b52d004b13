"""Loads seen under one placement lead to a better one; too few rows, too soon, or a good placement lead to none."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from expertmesh.cluster.rebalance import LoadBook, Rebalancer, answer, missing_copies
from expertmesh.config import RebalanceConfig
from expertmesh.errors import InvalidRequest
from expertmesh.experts.eplb import EplbConfig, predict
from expertmesh.router.epoch import Epoch, Member
from expertmesh.router.placement import Placement, uniform
from expertmesh.router.status import ExpertRows

NUM_LAYERS, NUM_LOGICAL = 3, 16
CONFIG = RebalanceConfig(interval_s=10.0, rows_per_expert=10)
EPLB = EplbConfig(num_redundant=4)


def replace_version(placement: Placement, version: int) -> Placement:
    return Placement(version, placement.num_logical_experts, placement.ep_size, placement.physical_to_logical)


def epoch_of(placement: Placement, number: int = 1) -> Epoch:
    attention = Member(member_id="a", attention=True, expert=False, host="h", control_port=1, store_port=2)
    shards = [
        Member(member_id=f"s{i}", attention=False, expert=True, host=f"h{i}", control_port=0, store_port=0)
        for i in range(placement.ep_size)
    ]
    return Epoch(number=number, members=(attention, *shards), placement=replace_version(placement, number))


def reports(epoch: Epoch, loads: np.ndarray) -> list[ExpertRows]:
    """What each shard counts when its experts get `loads` [layers, logical], split evenly over copies."""
    placement = epoch.placement
    table = placement.physical_to_logical.numpy()
    counts = placement.logical_replica_count.numpy()
    rows = np.zeros(table.shape, dtype=np.int64)
    for layer, physical in zip(*(table >= 0).nonzero(), strict=True):
        rows[layer, physical] = loads[layer, table[layer, physical]] // counts[layer, table[layer, physical]]
    by_rank = rows.reshape(NUM_LAYERS, placement.ep_size, -1)
    return [
        ExpertRows(name=f"s{i}", placement_version=epoch.placement_version, rows=by_rank[:, i].copy())
        for i in range(placement.ep_size)
    ]


@pytest.fixture
def hot() -> np.ndarray:
    loads = np.full((NUM_LAYERS, NUM_LOGICAL), 100)
    loads[:, :4] = 1000  # all on the first of four ranks
    return loads


def of(placement: Placement) -> tuple[Epoch, LoadBook, Rebalancer]:
    epoch, book = epoch_of(placement), LoadBook(NUM_LAYERS, NUM_LOGICAL)
    book.learn(epoch)
    return epoch, book, Rebalancer(CONFIG, EPLB, book)


def test_hot_experts_are_spread(hot):
    epoch, book, rebalancer = of(uniform(NUM_LAYERS, NUM_LOGICAL, 4, 4))
    for report in reports(epoch, hot):
        book.take(report)
    assert rebalancer.look(epoch, 5.0) is None  # too soon after a change
    wish = rebalancer.look(epoch, 20.0)
    assert wish is not None
    assert np.array_equal(wish.loads, np.asarray(hot, dtype=float) // 2 * 2)
    before = predict(epoch.placement, hot).max_over_mean
    plan = answer(wish, epoch, CONFIG, EPLB, 2)
    assert plan.predicted_gain > CONFIG.min_gain
    assert predict(plan.placement, hot).max_over_mean < 1.1 < before
    assert rebalancer.look(epoch_of(plan.placement, 2), 40.0) is None  # its window has no rows yet


def test_cumulative_reports_count_once_and_strangers_say_nothing(hot):
    epoch, book, _ = of(uniform(NUM_LAYERS, NUM_LOGICAL, 4, 4))
    first = reports(epoch, hot)
    for report in [*first, *first, *reports(epoch, 2 * hot)]:
        book.take(report)
    assert book.window.sum() == pytest.approx(2 * sum(r.rows.sum() for r in first), rel=1e-3)
    seen = book.window.copy()
    book.take(replace(first[0], name="somebody"))
    book.take(replace(first[0], placement_version=99))
    book.take(replace(first[0], rows=np.zeros((1, 1), dtype=np.int64)))
    assert np.array_equal(book.window, seen)


def test_an_even_load_and_too_few_rows_change_nothing():
    epoch, book, rebalancer = of(uniform(NUM_LAYERS, NUM_LOGICAL, 4, 4))
    few = np.zeros((NUM_LAYERS, NUM_LOGICAL), dtype=np.int64)
    few[:, 0] = 20
    for report in reports(epoch, few):
        book.take(report)
    assert rebalancer.look(epoch, 20.0) is None
    for report in reports(epoch, np.full((NUM_LAYERS, NUM_LOGICAL), 5000)):
        book.take(report)
    assert rebalancer.look(epoch, 20.0) is None


def test_copies_that_a_death_took_are_made_again():
    epoch, _, rebalancer = of(uniform(NUM_LAYERS, NUM_LOGICAL, 4))
    assert missing_copies(epoch.placement, EPLB) == NUM_LAYERS * 4
    wish = rebalancer.look(epoch, 20.0)
    assert wish is not None
    assert wish.min_gain == 0
    assert missing_copies(answer(wish, epoch, CONFIG, EPLB, 2).placement, EPLB) == 0


def test_a_wish_of_an_operator_does_not_wait():
    epoch, _, rebalancer = of(uniform(NUM_LAYERS, NUM_LOGICAL, 4, 4))
    wish = rebalancer.look(epoch, 0.1, asked="asked for")
    assert wish is not None
    assert wish.reason == "asked for"
    alone, _, rebalancer = of(uniform(NUM_LAYERS, NUM_LOGICAL, 1))
    assert rebalancer.look(alone, 100.0, asked="asked for") is None


def test_an_error_crosses_processes():
    error = pickle.loads(pickle.dumps(InvalidRequest("member_id", "x", "one of a, b")))
    assert (str(error), error.field) == ("member_id: got 'x', expected one of a, b", "member_id")
