"""A cluster whose processes are all replaced, tier by tier, under running streams: none ends, no token changes."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from solo_engine import solo_tokens
from test_cluster import all_idle, client_of, config_of, eventually, token_ids
from test_elastic import PROMPTS, serving

from expertmesh.client import Client
from expertmesh.cluster.app import Cluster

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_runtime"), pytest.mark.timeout(300)]

NUM_TOKENS = 60  # far below a gateway's grace, on a busy machine too


def test_an_upgrade_replaces_every_process_and_ends_no_stream(tiny_checkpoint: Path):
    expected = solo_tokens(tiny_checkpoint, PROMPTS, NUM_TOKENS)
    config = replace(config_of(tiny_checkpoint, num_attention=2, num_shards=2), num_gateways=2)
    config = replace(config, network=replace(config.network, gateway_port=two_free_ports()))
    with Cluster(config) as cluster:
        before = {process.pid for process in cluster.state().processes}
        assert len(before) == 6
        with client_of(cluster) as client, resumable_streams(client, expected):
            cluster.upgrade()
        assert eventually(lambda: {p.pid for p in cluster.state().processes if p.state == "ready"}.isdisjoint(before))
        assert eventually(lambda: len(serving(cluster, "attention")) == len(serving(cluster, "expert")) == 2, 60.0)
        assert eventually(lambda: all_idle(cluster))


@contextmanager
def resumable_streams(client: Client, expected: list[list[int]]) -> Iterator[None]:
    """One after the other for each prompt, all compared. A gateway that drains cuts what lasts longer than its grace;
    the client goes on with it at the other gateway."""
    enough = threading.Event()
    wrong: list[str] = []
    num_streams = [0]

    def repeat(prompt: list[int], want: list[int]) -> None:
        while not enough.is_set() and not wrong:
            try:
                stream = client.generate(
                    token_ids=prompt,
                    include_token_ids=True,
                    resumable=True,
                    temperature=0.0,
                    max_tokens=NUM_TOKENS,
                    ignore_eos=True,
                    timeout_s=120.0,
                )
                if (got := token_ids(stream)) != want:
                    wrong.append(f"{prompt[:3]}: {len(got)} tokens, not those of one process")
            except Exception as error:
                wrong.append(f"{prompt[:3]}: {error!r}")
            num_streams[0] += 1

    threads = [threading.Thread(target=repeat, args=pair) for pair in zip(PROMPTS, expected, strict=True)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        enough.set()
        for thread in threads:
            thread.join(timeout=120.0)
    assert not wrong
    print(f"\n{num_streams[0]} streams over the upgrade")


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
