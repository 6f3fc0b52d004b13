"""A cluster whose processes are all replaced, tier by tier, under running streams: none ends, no token changes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from elastic_streams import BREATH_S, PROMPTS, expected_tokens
from shared_cluster import NUM_ATTENTION, NUM_GATEWAYS, serving, sized
from test_cluster import all_idle, client_of, eventually, token_ids

from expertmesh.client import Client
from expertmesh.cluster.app import Cluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

NUM_SHARDS = 2

NUM_TOKENS = 60  # far below a gateway's grace, on a busy machine too


def test_an_upgrade_replaces_every_process_and_ends_no_stream(shared: Cluster, tiny_checkpoint: Path):
    """Also where an operator has asked for another number of shards than the configuration's: it stays."""
    expected = [tokens[:NUM_TOKENS] for tokens in expected_tokens(tiny_checkpoint)]
    sized(shared, NUM_SHARDS)
    before = {process.pid for process in shared.state().processes if process.state == "ready"}
    assert len(before) == NUM_GATEWAYS + NUM_ATTENTION + NUM_SHARDS
    with client_of(shared) as client, resumable_streams(client, expected):
        shared.upgrade()
    assert eventually(lambda: {p.pid for p in shared.state().processes if p.state == "ready"}.isdisjoint(before))
    for role, count in (("attention", NUM_ATTENTION), ("expert", NUM_SHARDS)):
        assert eventually(lambda role=role, count=count: len(serving(shared, role)) == count, 60.0)
    assert eventually(lambda: all_idle(shared))


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
            enough.wait(BREATH_S)

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
