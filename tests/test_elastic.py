"""Whole clusters in real Ray processes that lose members, get new ones and change their size under running streams:
no stream ends, and every token is the one that a single process says."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from solo_engine import solo_tokens
from test_cluster import all_idle, client_of, config_of, eventually, greedy, state_or_none

from expertmesh.client import AnswerDelta, Client, ReasoningDelta
from expertmesh.cluster.app import Cluster
from expertmesh.config import AutoscalingConfig, ClusterConfig, ExchangeConfig
from expertmesh.errors import InvalidRequest
from expertmesh.proto import expertmesh_pb2 as pb
from expertmesh.router.client.gateways import Unary
from expertmesh.router.status import ProcessStatus

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_runtime")]

PROMPTS = [[1, 2, 3], list(range(1000, 1050)), [7]]
NUM_TOKENS = 300
HANG_S = 3.0  # after so long a silent peer breaks the epoch


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path) -> list[list[int]]:
    return solo_tokens(tiny_checkpoint, PROMPTS, NUM_TOKENS)


@pytest.fixture(scope="module")
def run_one(ray_runtime: None) -> Iterator[Callable[[str, ClusterConfig], Cluster]]:
    """The cluster of a name, which tests share and leave whole. A Ray runs one at a time: another one ends."""
    running: dict[str, Cluster] = {}

    def run(name: str, config: ClusterConfig) -> Cluster:
        if name not in running:
            stop()
            cluster = Cluster(config)
            cluster.start()
            running[name] = cluster
        return running[name]

    def stop() -> None:
        while running:
            running.popitem()[1].stop()

    yield run
    stop()


@pytest.fixture
def plain(run_one, tiny_checkpoint: Path) -> Cluster:
    """One attention replica, two shards, one copy of every expert."""
    return run_one("plain", config_of(tiny_checkpoint, num_shards=2))


@pytest.fixture
def redundant(run_one, tiny_checkpoint: Path) -> Cluster:
    """Two attention replicas, three shards, two copies of every expert."""
    config = config_of(tiny_checkpoint, num_attention=2, num_shards=3)
    exchange = ExchangeConfig(timeout_base_s=HANG_S, timeout_per_row_s=0.0)
    return run_one("redundant", replace(config, num_redundant_experts=64, exchange=exchange))


@pytest.fixture
def growing(run_one, tiny_checkpoint: Path) -> Cluster:
    """One of each tier while idle, two when busy."""
    scaling = AutoscalingConfig(
        max_expert_shards=2,
        target_busy=0.02,
        max_attention_replicas=2,
        target_pressure=0.3,
        upscale_delay_s=0.5,
        downscale_delay_s=1.0,
        cooldown_s=1.0,
    )
    config = config_of(tiny_checkpoint, num_attention=1, num_shards=1)
    config = replace(config, autoscaling=scaling, scheduler=replace(config.scheduler, max_num_seqs=4))
    return run_one("growing", config)


class Listener:
    """Reads one stream in a thread and notes when each token came."""

    def __init__(self, client: Client, prompt: list[int]) -> None:
        self._stream = greedy(client, prompt, NUM_TOKENS)
        self.token_ids: list[int] = []
        self.came_at: list[float] = []
        self.error: Exception | None = None
        self.begun = threading.Event()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        try:
            for event in self._stream:
                if isinstance(event, AnswerDelta | ReasoningDelta):
                    self.token_ids += event.token_ids
                    self.came_at += [time.monotonic()] * len(event.token_ids)
                    self.begun.set()
        except Exception as error:  # shown by the test's thread
            self.error = error
        self.begun.set()

    def finish(self) -> list[int]:
        self._thread.join(timeout=60.0)
        assert not self._thread.is_alive(), f"{len(self.token_ids)} tokens, then nothing"
        if self.error is not None:
            raise self.error
        return self.token_ids

    def pause_after(self, moment: float) -> float:
        """The longest wait for a token that ended after `moment`."""
        gaps = [b - a for a, b in zip(self.came_at, self.came_at[1:], strict=False) if b > moment]
        return max(gaps, default=0.0)


def listeners(client: Client) -> list[Listener]:
    begun = [Listener(client, prompt) for prompt in PROMPTS]
    for listener in begun:
        assert listener.begun.wait(60.0)
    return begun


def serving(cluster: Cluster, role: str) -> list[ProcessStatus]:
    """Members of a role that are in the epoch in force."""
    state = state_or_none(cluster)
    if state is None or not state.ready:
        return []
    return [p for p in state.processes if p.role == role and p.name in state.ranks and p.epoch == state.epoch]


def kill_under_streams(cluster: Cluster, role: str, count: int, expected: list[list[int]]) -> float:
    """SIGKILL one of the `count` members of the role while streams run; the longest pause that a client saw."""
    assert eventually(lambda: len(serving(cluster, role)) == count), "a member's first report in the epoch is missing"
    known, suspected_before = {p.name for p in serving(cluster, role)}, cluster.state().num_returned
    victim = serving(cluster, role)[0]
    with client_of(cluster) as client:
        running = listeners(client)
        killed_at = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        assert [listener.finish() for listener in running] == expected
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


@contextlib.contextmanager
def under_load(client: Client, expected: list[list[int]]) -> Iterator[None]:
    """One stream of each prompt after the other, all compared; the last ones end after the block."""
    enough = threading.Event()
    failures: list[str] = []
    pauses_s: list[float] = []

    def repeat(prompt: list[int], want: list[int]) -> None:
        while not enough.is_set() and not failures:
            listener = Listener(client, prompt)
            try:
                if listener.finish() != want:
                    failures.append(f"{prompt}: other tokens")
            except Exception as error:
                failures.append(f"{prompt}: {error!r}")
            pauses_s.append(listener.pause_after(0.0))

    threads = [threading.Thread(target=repeat, args=pair) for pair in zip(PROMPTS, expected, strict=True)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        enough.set()
        for thread in threads:
            thread.join(timeout=60.0)
    assert not failures
    print(f"\n{len(pauses_s)} streams, the longest pause {max(pauses_s):.3f} s")


def names_of(cluster: Cluster) -> set[str]:
    return {process.name for process in serving(cluster, "expert")}


def operate(client: Client, method: str, request: object) -> str:
    summary: str = client.call(Unary("Cluster", method, request)).summary
    return summary


def test_shards_come_and_go_under_running_streams(plain: Cluster, expected: list[list[int]]):
    """An operator asks for more shards, for one to be drained, for a placement by load, and for fewer shards."""
    with client_of(plain) as client, under_load(client, expected):
        for count in (3, 2):
            began_at = time.monotonic()
            assert operate(client, "Scale", pb.ScaleRequest(num_shards=count)) == f"{count} shards"
            assert eventually(lambda count=count: len(serving(plain, "expert")) == count, 60.0)
            print(f"\n{count} shards after {time.monotonic() - began_at:.1f} s")
        leaving, stays = (process.name for process in serving(plain, "expert"))
        operate(client, "Drain", pb.DrainRequest(member_id=leaving))
        assert eventually(lambda: names_of(plain) - {leaving, stays} and len(names_of(plain)) == 2, 60.0)
        assert stays in names_of(plain)
        with pytest.raises(InvalidRequest, match=stays):
            operate(client, "Drain", pb.DrainRequest(member_id=leaving))
        assert "x predicted" in operate(client, "Rebalance", pb.RebalanceRequest())
    assert eventually(lambda: all_idle(plain))
    assert [d.text for d in plain.state().decisions][:3] == [
        "3 shards: asked for",
        "2 shards: asked for",
        f"{leaving} drains: asked for",
    ]


def test_streams_wait_for_the_only_shards_replacement(plain: Cluster, expected: list[list[int]]):
    with client_of(plain) as client:
        operate(client, "Scale", pb.ScaleRequest(num_shards=1))
    assert eventually(lambda: len(serving(plain, "expert")) == 1, 60.0)
    kill_under_streams(plain, "expert", 1, expected)


def test_busy_tiers_grow_by_themselves_and_shrink_when_idle(growing: Cluster, expected: list[list[int]]):
    """Shards by their busy fraction, attention replicas by the places taken."""

    def sizes() -> tuple[int, int]:
        return len(serving(growing, "attention")), len(serving(growing, "expert"))

    with client_of(growing) as client, under_load(client, expected):
        assert eventually(lambda: sizes() == (2, 2), 60.0)
    assert eventually(lambda: sizes() == (1, 1), 60.0)
    assert eventually(lambda: all_idle(growing))
    grown, shrunk = [d.text for d in growing.state().decisions if "attention replicas" in d.text][:2]
    assert grown.endswith("target 0.30: 2 attention replicas")
    assert shrunk.endswith("target 0.30: 1 attention replicas are enough")


def test_a_killed_shard_changes_no_token_where_copies_live(redundant: Cluster, expected: list[list[int]]):
    kill_under_streams(redundant, "expert", 3, expected)


def test_a_killed_attention_replica_changes_no_token(redundant: Cluster, expected: list[list[int]]):
    kill_under_streams(redundant, "attention", 2, expected)


def test_a_shard_that_hangs_changes_no_token_and_comes_back(redundant: Cluster, expected: list[list[int]]):
    """SIGSTOP: no connection closes, so the exchange's deadline and then a probe find it."""
    assert eventually(lambda: len(serving(redundant, "expert")) == 3)
    victim = serving(redundant, "expert")[0]
    with client_of(redundant) as client:
        running = listeners(client)
        stopped_at = time.monotonic()
        os.kill(victim.pid, signal.SIGSTOP)
        try:
            assert [listener.finish() for listener in running] == expected
        finally:
            os.kill(victim.pid, signal.SIGCONT)
        pause_s = max(listener.pause_after(stopped_at) for listener in running)
    print(f"\nSIGSTOP of {victim.name}: pause {pause_s:.3f} s")
    assert eventually(lambda: victim.name in {p.name for p in serving(redundant, "expert")}, 60.0)
    assert eventually(lambda: all_idle(redundant))
    state = redundant.state()
    assert state.num_returned == 1
    assert f"{victim.name} was given up and lives: it joins again" in [d.text for d in state.decisions]
