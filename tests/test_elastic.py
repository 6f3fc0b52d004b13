"""A whole cluster in real Ray processes that loses members, gets new ones, changes its size and is upgraded while
streams run: none ends, and every token is the one that a single process says."""

import os
import signal
import time

import pytest
from elastic_streams import NUM_BRIEF, listeners, resumable_streams, under_load
from shared_cluster import NUM_ATTENTION, NUM_GATEWAYS, NUM_SHARDS, serving, sized
from test_cluster import all_idle, client_of, eventually

from expertmesh.client import Client
from expertmesh.cluster.app import Cluster
from expertmesh.errors import InvalidRequest
from expertmesh.proto import expertmesh_pb2 as pb
from expertmesh.router.client.gateways import Unary

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

NUM_UPGRADED = 2  # shards; one after the other is replaced


def kill_under_streams(cluster: Cluster, role: str, count: int, solo: list[list[int]]) -> float:
    """SIGKILL one of the `count` members of the role while streams run; the longest pause that a client saw."""
    assert eventually(lambda: len(serving(cluster, role)) == count), "a member's first report in the epoch is missing"
    known, suspected_before = {p.name for p in serving(cluster, role)}, cluster.state().num_returned
    victim = serving(cluster, role)[0]
    with client_of(cluster) as client:
        running = listeners(client)
        killed_at = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        assert [listener.finish() for listener in running] == solo
        pause_s = max(listener.pause_after(killed_at) for listener in running)
    print(f"\nSIGKILL of {victim.name}: pause {pause_s:.3f} s")
    assert eventually(lambda: len(serving(cluster, role)) == count, 60.0), "no replacement joined"
    after = serving(cluster, role)
    assert victim.name not in {p.name for p in after}
    if role == "expert" and count > 1:
        assert any("experts by peers" in p.detail for p in after if p.name not in known), [p.detail for p in after]
    assert eventually(lambda: all_idle(cluster))
    assert cluster.state().num_returned == suspected_before, "a member that lived was given up"
    return pause_s


def names_of(cluster: Cluster) -> set[str]:
    return {process.name for process in serving(cluster, "expert")}


def operate(client: Client, method: str, request: object) -> str:
    summary: str = client.call(Unary("Cluster", method, request)).summary
    return summary


def test_a_killed_shard_changes_no_token_where_copies_live(shared: Cluster, solo: list[list[int]]):
    kill_under_streams(sized(shared, NUM_SHARDS), "expert", NUM_SHARDS, solo)


def test_a_killed_attention_replica_changes_no_token(shared: Cluster, solo: list[list[int]]):
    kill_under_streams(shared, "attention", NUM_ATTENTION, solo)


def test_a_shard_that_hangs_changes_no_token_and_comes_back(shared: Cluster, solo: list[list[int]]):
    """SIGSTOP: no connection closes, so the exchange's deadline and then a probe find it."""
    count = len(serving(sized(shared, NUM_SHARDS), "expert"))
    returned_before = shared.state().num_returned
    victim = serving(shared, "expert")[0]
    with client_of(shared) as client:
        running = listeners(client)
        stopped_at = time.monotonic()
        os.kill(victim.pid, signal.SIGSTOP)
        try:
            assert [listener.finish() for listener in running] == solo
        finally:
            os.kill(victim.pid, signal.SIGCONT)
        pause_s = max(listener.pause_after(stopped_at) for listener in running)
    print(f"\nSIGSTOP of {victim.name}: pause {pause_s:.3f} s")
    assert eventually(lambda: len(serving(shared, "expert")) == count and victim.name in names_of(shared), 60.0)
    assert eventually(lambda: all_idle(shared))
    state = shared.state()
    assert state.num_returned == returned_before + 1
    assert f"{victim.name} was given up and lives: it joins again" in [d.text for d in state.decisions]


def test_shards_come_and_go_under_running_streams(shared: Cluster, solo: list[list[int]]):
    """An operator asks for more shards and for one to be drained, for fewer shards, and for a placement by load."""
    leaving, *stay = (process.name for process in serving(sized(shared, NUM_SHARDS), "expert"))
    asked_before = texts_of(shared)
    with client_of(shared) as client, under_load(client, solo):
        began_at = time.monotonic()
        assert operate(client, "Scale", pb.ScaleRequest(num_shards=5)) == "5 shards"
        operate(client, "Drain", pb.DrainRequest(member_id=leaving))
        assert eventually(lambda: leaving not in names_of(shared) and len(names_of(shared)) == 5, 60.0)
        assert set(stay) < names_of(shared)
        print(f"\none more shard, and one in the place of another, after {time.monotonic() - began_at:.1f} s")
        began_at = time.monotonic()
        assert operate(client, "Scale", pb.ScaleRequest(num_shards=2)) == "2 shards"
        assert eventually(lambda: len(names_of(shared)) == 2, 60.0)
        print(f"\n2 shards after {time.monotonic() - began_at:.1f} s")
        with pytest.raises(InvalidRequest, match=min(names_of(shared))):
            operate(client, "Drain", pb.DrainRequest(member_id=leaving))
        assert "x predicted" in operate(client, "Rebalance", pb.RebalanceRequest())
    assert eventually(lambda: all_idle(shared))
    asked = [text for text in texts_of(shared)[len(asked_before) :] if text.endswith("asked for")]
    assert asked[:3] == ["5 shards: asked for", f"{leaving} drains: asked for", "2 shards: asked for"]


def texts_of(cluster: Cluster) -> list[str]:
    return [decision.text for decision in cluster.state().decisions]


def test_an_upgrade_replaces_every_process_and_ends_no_stream(shared: Cluster, solo: list[list[int]]):
    """Tier by tier; the number of shards stays what an operator has asked for."""
    expected = [tokens[:NUM_BRIEF] for tokens in solo[:2]]
    sized(shared, NUM_UPGRADED)
    before = {process.pid for process in shared.state().processes if process.state == "ready"}
    assert len(before) == NUM_GATEWAYS + NUM_ATTENTION + NUM_UPGRADED
    with client_of(shared) as client, resumable_streams(client, expected):
        shared.upgrade()
    assert eventually(lambda: {p.pid for p in shared.state().processes if p.state == "ready"}.isdisjoint(before))
    for role, count in (("attention", NUM_ATTENTION), ("expert", NUM_UPGRADED)):
        assert eventually(lambda role=role, count=count: len(serving(shared, role)) == count, 60.0)
    assert eventually(lambda: all_idle(shared))


def test_streams_wait_for_the_only_shards_replacement(shared: Cluster, solo: list[list[int]]):
    kill_under_streams(sized(shared, 1), "expert", 1, solo)
