"""Promise: each key gets its share of a full tier, whatever the others queue; nothing is lost or reordered in a key."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.router.gateway.fair_queue import QUANTUM, FairQueue

KEYS = "abcd"
MAX_COST = 2000
COSTS = st.integers(1, MAX_COST)
REQUESTS = st.lists(st.tuples(st.sampled_from(KEYS), COSTS), max_size=120)


def filled(requests) -> FairQueue:
    queue: FairQueue = FairQueue()
    for number, (key, cost) in enumerate(requests):
        queue.push(key, cost, (key, number))
    return queue


@settings(deadline=None, max_examples=40)
@given(REQUESTS)
def test_everything_comes_out_once_and_in_order_within_a_key(requests):
    queue = filled(requests)
    assert len(queue) == len(requests)
    popped = [queue.pop() for _ in requests]
    for key in KEYS:
        assert [n for k, n in popped if k == key] == [n for n, (k, _) in enumerate(requests) if k == key]
    assert len(queue) == 0
    with pytest.raises(IndexError):
        queue.pop()


@settings(deadline=None, max_examples=40)
@given(REQUESTS, st.integers(0, 119), st.integers(1, int(QUANTUM)))
def test_a_new_keys_first_request_waits_for_one_turn_of_each_other_key(requests, num_served, cost):
    queue = filled(requests)
    for _ in range(min(num_served, len(requests))):
        queue.pop()
    queue.push("new", cost, ("new", -1))
    before = Counter[str]()
    while (found := queue.pop())[0] != "new":
        before[found[0]] += requests[found[1]][1]
    assert all(tokens <= QUANTUM + MAX_COST for tokens in before.values())


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(st.sampled_from(KEYS), st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2),
    st.lists(COSTS, min_size=100, max_size=100),
    st.integers(1, 90),
)
def test_backlogged_keys_get_tokens_by_weight_to_within_a_turn_each(weights, costs, num_popped):
    queue: FairQueue = FairQueue(weights)
    cost_of = {}
    for number, cost in enumerate(costs):
        for key in weights:
            cost_of[key, number] = cost
            queue.push(key, cost, (key, number))
    given_tokens = Counter[str]()
    for _ in range(num_popped):
        found = queue.pop()
        given_tokens[found[0]] += cost_of[found]
    for a in weights:
        for b in weights:
            slack = 2 * QUANTUM + max(costs) / weights[a] + max(costs) / weights[b]
            assert abs(given_tokens[a] / weights[a] - given_tokens[b] / weights[b]) <= slack


@settings(deadline=None, max_examples=40)
@given(REQUESTS, st.sets(st.integers(0, 119)))
def test_who_leaves_is_gone_and_the_rest_stays(requests, leaving):
    items = [(key, number) for number, (key, _) in enumerate(requests)]
    queue: FairQueue = FairQueue()
    for item, (key, cost) in zip(items, requests):
        queue.push(key, cost, item)
    gone = {items[i] for i in leaving if i < len(items)}
    for item in gone:
        assert queue.remove(item[0], item)
        assert not queue.remove(item[0], item)
    assert {queue.pop() for _ in range(len(queue))} == set(items) - gone


def test_a_key_that_took_more_than_it_paid_waits_for_it():
    queue: FairQueue = FairQueue(quantum=100)
    for number in range(20):
        queue.push("a", 100, ("a", number))
        queue.push("b", 100, ("b", number))
    assert [queue.pop()[0] for _ in range(4)] == ["a", "b", "a", "b"]
    queue.charge("a", 300)
    assert [queue.pop()[0] for _ in range(6)] == ["b", "b", "b", "a", "b", "a"]
    queue.charge("b", -1000)  # no request was so much cheaper: at most a turn is given back
    assert Counter(queue.pop()[0] for _ in range(6))["a"] >= 2


def test_idle_time_earns_nothing():
    queue: FairQueue = FairQueue(quantum=100)
    for number in range(20):
        queue.push("busy", 100, ("busy", number))
    for _ in range(10):
        queue.pop()
    for number in range(10):
        queue.push("late", 100, ("late", number))
    assert Counter(queue.pop()[0] for _ in range(8)) == {"busy": 4, "late": 4}


def test_any_number_of_new_keys_starves_nobody_and_leaves_nothing_behind():
    queue: FairQueue = FairQueue(quantum=7)
    for number in range(500):
        queue.push("old", 7, ("old", number))
    num_old = 0
    for number in range(500):
        queue.push(f"key-{number}", 5, (f"key-{number}", 0))
        num_old += queue.pop()[0] == "old"
    assert num_old >= 20
    while queue:
        queue.pop()
    assert not queue._lines
    queue.push("old", 7, ("old", 0))
    for number in range(500):  # each leaves before it is served
        queue.push(f"key-{number}", 5, number)
        queue.remove(f"key-{number}", number)
    assert len(queue._lines) < 100
