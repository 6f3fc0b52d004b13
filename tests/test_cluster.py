"""Whole clusters in real Ray processes: every layout says what a single process says, and ends without a trace."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from solo_engine import PROMPTS

from expertmesh.client import AnswerDelta, Client, ReasoningDelta, Started, Stream
from expertmesh.cluster.app import Cluster
from expertmesh.config import CacheConfig, ClusterConfig, NetworkConfig
from expertmesh.errors import CheckpointError, StartupError, Unauthenticated, Unavailable
from expertmesh.request import FinishReason
from expertmesh.router.placement import Placement
from expertmesh.router.status import ClusterState

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_runtime")]

MAX_TOKENS = 24
LONG = 120


@pytest.fixture
def expected(solo: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of one process, `LONG` of each prompt."""
    return [tokens[:LONG] for tokens in solo]


@pytest.fixture
def large(shared: Cluster) -> Cluster:
    """Two gateways, two attention replicas, four shards with two copies of every expert."""
    return shared


def config_of(
    model: Path, *, num_attention: int = 1, num_shards: int = 2, layout: str = "disaggregated", timeout_s: float = 150.0
) -> ClusterConfig:
    return ClusterConfig(
        model=str(model),
        layout=layout,  # type: ignore[arg-type]
        num_attention_replicas=num_attention,
        num_expert_shards=num_shards,
        startup_timeout_s=timeout_s,
        network=NetworkConfig(gateway_port=0),
        cache=CacheConfig(kv_memory_bytes=16 << 20),
    )


def client_of(cluster: Cluster) -> Client:
    return Client(cluster.gateways, cluster_token=cluster.config.network.cluster_token)


def greedy(client: Client, prompt: list[int], max_tokens: int) -> Stream:
    return client.generate(
        token_ids=prompt,
        include_token_ids=True,
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=True,
        timeout_s=60.0,
    )


def token_ids(stream: Stream) -> list[int]:
    return [i for event in stream if isinstance(event, AnswerDelta | ReasoningDelta) for i in event.token_ids]


def eventually(holds: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    """Poll what another process reports; true as soon as it holds."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def all_idle(cluster: Cluster) -> bool:
    """Every attention member reports no request and all blocks free."""
    attention = [p for p in cluster.state().processes if p.attention]
    return all(p.num_running == p.num_waiting == 0 and p.num_free_kv_blocks == p.num_kv_blocks > 0 for p in attention)


@pytest.mark.parametrize(
    ("layout", "num_attention", "num_shards"),
    [("disaggregated", 1, 1), ("colocated", 1, 1), ("colocated", 2, 1)],
)
def test_every_layout_says_what_one_process_says(
    tiny_checkpoint: Path, expected: list[list[int]], layout: str, num_attention: int, num_shards: int
):
    config = config_of(tiny_checkpoint, num_attention=num_attention, num_shards=num_shards, layout=layout)
    with Cluster(config) as cluster, client_of(cluster) as client:
        streams = [greedy(client, prompt, MAX_TOKENS) for prompt in PROMPTS]
        assert [token_ids(s) for s in streams] == [tokens[:MAX_TOKENS] for tokens in expected]


def broken_copy(source: Path, folder: Path, keep_bytes: int) -> Path:
    shutil.copytree(source, folder)
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - keep_bytes)
    return folder


def test_a_truncated_checkpoint_ends_the_start_with_file_and_remedy(tiny_checkpoint: Path, tmp_path: Path):
    broken = broken_copy(tiny_checkpoint, tmp_path / "broken", 4096)
    started = time.monotonic()
    with pytest.raises(StartupError, match=r"CheckpointError: .*download the file again .*model\.safetensors"):
        Cluster(config_of(broken)).start()
    assert time.monotonic() - started < 150.0


def test_a_start_that_takes_too_long_ends_at_its_bound(tiny_checkpoint: Path):
    with pytest.raises(StartupError, match=r"not ready after 0 s: .*raise startup_timeout_s"):
        Cluster(config_of(tiny_checkpoint, num_shards=1, timeout_s=0.1)).start()


def test_a_folder_that_is_no_checkpoint_fails_before_anything_starts(tmp_path: Path):
    with pytest.raises(CheckpointError, match="the file is missing"), contextlib.closing(_Stopped(tmp_path)) as made:
        made.cluster.start()


class _Stopped:
    def __init__(self, folder: Path) -> None:
        self.cluster = Cluster(config_of(folder))

    def close(self) -> None:
        assert self.cluster.conductor is None


def test_two_replicas_and_four_shards_say_what_one_process_says(large: Cluster, expected: list[list[int]]):
    with client_of(large) as client:
        streams = [greedy(client, prompt, MAX_TOKENS) for prompt in PROMPTS]
        assert [token_ids(s) for s in streams] == [tokens[:MAX_TOKENS] for tokens in expected]
    assert eventually(lambda: all_idle(large))


def test_a_second_cluster_in_the_same_ray_is_refused_and_harms_nobody(large: Cluster, tiny_checkpoint: Path):
    with pytest.raises(StartupError, match="a cluster runs in this Ray already"):
        Cluster(config_of(tiny_checkpoint)).start()
    assert large.state().ready


def test_tokens_do_not_change_while_placements_do(large: Cluster, expected: list[list[int]]):
    assert large.conductor is not None
    first = large.state().epoch
    with client_of(large) as client:
        streams = [greedy(client, prompt, LONG) for prompt in PROMPTS]
        begun = [until_first_token(s) for s in streams]
        for number in (first + 1, first + 2):
            epoch = large.conductor.epoch()
            assert epoch is not None
            large.conductor.place(rotated(epoch.placement))
            assert eventually(lambda number=number: large.state().epoch == number and large.state().ready)
        assert [ids + token_ids(s) for ids, s in zip(begun, streams)] == expected
    state = large.state()
    assert (state.epoch, state.placement_version) == (first + 2, first + 2)
    assert eventually(lambda: all(p.epoch == first + 2 for p in large.state().processes if p.role != "gateway"))


def test_streams_and_epochs_outlive_the_conductor(large: Cluster, expected: list[list[int]]):
    """Soft state: killed under traffic, it comes back empty, the members join again, and the epoch goes on."""
    assert large.conductor is not None
    before = large.state()
    with client_of(large) as client:
        streams = [greedy(client, prompt, LONG) for prompt in PROMPTS]
        begun = [until_first_token(s) for s in streams]
        os.kill(before.conductor_pid, signal.SIGKILL)
        assert [ids + token_ids(s) for ids, s in zip(begun, streams)] == expected
        assert eventually(lambda: (after := state_or_none(large)) is not None and after.ready, 60.0)
        assert large.state().epoch == before.epoch
        epoch = large.conductor.epoch()
        assert epoch is not None
        large.conductor.place(rotated(epoch.placement))
        assert eventually(lambda: large.state().epoch > before.epoch and large.state().ready)
        assert token_ids(greedy(client, PROMPTS[0], MAX_TOKENS)) == expected[0][:MAX_TOKENS]


def state_or_none(cluster: Cluster) -> ClusterState | None:
    try:
        return cluster.state()
    except Unavailable:
        return None  # starting again


def until_first_token(stream: Stream) -> list[int]:
    for event in stream:
        if isinstance(event, AnswerDelta | ReasoningDelta):
            return list(event.token_ids)
    raise AssertionError("the stream ended without a token")


def rotated(placement: Placement) -> Placement:
    """Every expert on the next rank."""
    table = placement.physical_to_logical.roll(placement.slots_per_rank, dims=1)
    return Placement(placement.version, placement.num_logical_experts, placement.ep_size, table)


def test_cancel_ends_the_stream_and_frees_its_blocks(large: Cluster):
    with client_of(large) as client:
        stream = greedy(client, PROMPTS[1], 20_000)
        assert isinstance(next(stream), Started)
        until_first_token(stream)
        client.cancel(stream.request_id)
        token_ids(stream)
        assert stream.finished is not None
        assert stream.finished.reason is FinishReason.CANCELLED
        dropped = greedy(client, PROMPTS[0], 20_000)
        until_first_token(dropped)
        dropped.close()
    assert eventually(lambda: all_idle(large))


def test_a_session_goes_on_where_it_ended_at_any_gateway(large: Cluster):
    assert len(large.gateways) == 2
    for number, gateway in enumerate(large.gateways, start=1):
        with Client(gateway) as client:
            stream = client.session("talk").send(
                "Go on.", max_tokens=40, temperature=0.0, ignore_eos=True, timeout_s=60
            )
            stream.answer()
            finished = stream.finished
            assert finished is not None
            assert (finished.committed, finished.session_version) == (True, number)
            assert number == 1 or finished.cached_tokens >= 16
    with client_of(large) as client:
        assert [len(turn.messages) for turn in client.get_session("talk").turns] == [2, 2]
        client.delete_session("talk")
        assert list(client.list_sessions()) == []


def test_gateways_are_processes_without_torch(large: Cluster):
    gateways = [p for p in large.state().processes if p.role == "gateway"]
    assert len(gateways) == 2
    assert not [p.name for p in gateways if "libtorch" in Path(f"/proc/{p.pid}/maps").read_text()]


def test_topology_names_every_member(large: Cluster):
    with client_of(large) as client:
        topology = client.topology()
    assert (topology.layout, topology.num_logical_experts, topology.num_moe_layers) == ("disaggregated", 64, 2)
    assert list(topology.gateways) == list(large.gateways)
    assert sorted((m.attention, m.expert, m.state) for m in topology.members) == sorted(
        [(True, False, "ready")] * 2 + [(False, True, "ready")] * 4
    )
    assert sorted(m.ep_rank for m in topology.members) == [-1, -1, 0, 1, 2, 3]
    assert sum(m.num_physical_experts for m in topology.members) == 64 * 2 * 2
    with Client(large.gateways, cluster_token="guessed") as stranger, pytest.raises(Unauthenticated):
        stranger.topology()
