"""The one cluster that several test files use in turn: a start is 15 s of two cores.

`conftest.py` puts those files (`SHARERS`) next to each other and ends the cluster after them. A test says with `sized`
what size it needs, and leaves the cluster whole. One that is broken is not handed on: the next test gets a new one."""

import socket
from dataclasses import replace
from pathlib import Path

from test_cluster import client_of, config_of, eventually, state_or_none

from expertmesh.cluster.app import Cluster
from expertmesh.config import ExchangeConfig
from expertmesh.proto import expertmesh_pb2 as pb
from expertmesh.router.client.gateways import Unary
from expertmesh.router.status import ProcessStatus

NUM_ATTENTION, NUM_SHARDS, NUM_GATEWAYS = 2, 4, 2
HANG_S = 3.0  # after so long a silent peer breaks the epoch
WHOLE_S = 60.0

_running: list[Cluster] = []


def shared_cluster(checkpoint: Path) -> Cluster:
    """Two gateways, two attention replicas, four shards unless a test asked for another number; two copies of every
    expert."""
    if _running and not eventually(lambda: _is_whole(_running[0]), WHOLE_S):
        end_shared_cluster()
    if not _running:
        config = config_of(checkpoint, num_attention=NUM_ATTENTION, num_shards=NUM_SHARDS)
        exchange = ExchangeConfig(timeout_base_s=HANG_S, timeout_per_row_s=0.0)
        config = replace(config, num_gateways=NUM_GATEWAYS, num_redundant_experts=64, exchange=exchange)
        config = replace(config, network=replace(config.network, gateway_port=two_free_ports()))
        cluster = Cluster(config)
        cluster.start()
        _running.append(cluster)
    return _running[0]


def end_shared_cluster() -> None:
    while _running:
        _running.pop().stop()


def _is_whole(cluster: Cluster) -> bool:
    state = state_or_none(cluster)
    if state is None or not state.ready:
        return False
    by_role = [p.role for p in state.processes if p.state == "ready"]
    return by_role.count("attention") == NUM_ATTENTION and by_role.count("gateway") == NUM_GATEWAYS


def sized(cluster: Cluster, num_shards: int) -> Cluster:
    """The same cluster, with so many shards in the epoch in force."""
    if len(serving(cluster, "expert")) != num_shards:
        with client_of(cluster) as client:
            client.call(Unary("Cluster", "Scale", pb.ScaleRequest(num_shards=num_shards)))
        assert eventually(lambda: len(serving(cluster, "expert")) == num_shards, WHOLE_S)
    return cluster


def serving(cluster: Cluster, role: str) -> list[ProcessStatus]:
    """Members of a role that are in the epoch in force."""
    state = state_or_none(cluster)
    if state is None or not state.ready:
        return []
    return [p for p in state.processes if p.role == role and p.name in state.ranks and p.epoch == state.epoch]


def two_free_ports() -> int:
    """The first of two neighbours: clients know the gateways' addresses, so successors take the same ports."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port
