"""Promise: to the conversation's replica unless that is clearly busier, else to the least loaded, else shed."""

import pytest

from expertmesh.errors import NoReplica, QueueFull
from expertmesh.request import EngineLoad
from expertmesh.router.gateway.balancer import BalancerConfig, ReplicaView, pick

CONFIG = BalancerConfig(max_num_waiting=10, affinity_slack=4)


def view(
    name: str, waiting: int = 0, running: int = 0, used: int = 0, *, sent: int = 0, up: bool = True, leaving=False
):
    load = EngineLoad(
        num_running=running, num_waiting=waiting, num_free_kv_blocks=100 - used, num_kv_blocks=100, draining=leaving
    )
    return ReplicaView(replica_id=name, connected=up, load=load, num_unreported=sent)


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [
        ([view("a", waiting=2), view("b", running=9)], "b"),  # who waits counts before who runs
        ([view("a", running=5), view("b", running=3)], "b"),
        ([view("a", running=3, used=50), view("b", running=3, used=10)], "b"),
        ([view("b"), view("a")], "a"),  # ties the same on every gateway
        ([view("a", sent=3), view("b", waiting=2)], "b"),  # a burst since the last report
        ([view("a", up=False), view("b", waiting=9)], "b"),
        ([view("a", leaving=True), view("b", waiting=9)], "b"),
    ],
)
def test_the_least_loaded_replica_is_chosen(replicas, expected):
    assert pick(replicas, CONFIG) == expected


@pytest.mark.parametrize(("behind", "expected"), [(0, "a"), (4, "a"), (5, "b")])
def test_a_conversation_stays_until_its_replica_is_clearly_busier(behind, expected):
    assert pick([view("a", running=behind), view("b")], CONFIG, affinity="a") == expected


def test_affinity_to_a_lost_replica_is_no_error():
    assert pick([view("a", up=False), view("b")], CONFIG, affinity="a") == "b"


def test_full_queues_are_shed_with_a_delay():
    with pytest.raises(QueueFull, match="20 requests wait on 2") as caught:
        pick([view("a", waiting=10), view("b", waiting=4, sent=6)], CONFIG)
    assert caught.value.retry_after_s == CONFIG.retry_after_s


@pytest.mark.parametrize("replicas", [[], [view("a", up=False)], [view("a", leaving=True)]])
def test_nobody_to_send_to_is_unavailable(replicas):
    with pytest.raises(NoReplica):
        pick(replicas, CONFIG)


def test_a_burst_spreads_evenly_between_two_reports():
    sent = {"a": 0, "b": 0, "c": 0}
    for _ in range(9):
        sent[pick([view(name, sent=n) for name, n in sent.items()], CONFIG)] += 1
    assert sent == {"a": 3, "b": 3, "c": 3}
