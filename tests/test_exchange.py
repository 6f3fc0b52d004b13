"""Every back end moves the same rows: real processes, real Gloo, all layouts."""

import exchange_worlds
import process_world
import pytest
import torch
from exchange_conformance import CASES, LAYOUTS

from expertmesh.router.group import RendezvousStore

BACKENDS = [("local", "one rank")] + [("gloo", layout) for layout in LAYOUTS if layout != "one rank"]


@pytest.fixture(scope="module")
def store():
    return RendezvousStore("127.0.0.1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(("backend", "layout"), BACKENDS, ids=lambda v: v.replace(" ", "_"))
def test_rows_come_back_from_the_right_expert(store, backend, layout, dtype):
    pairs = _conform(store, backend, layout, dtype, redundant=0)
    assert sum(pairs) > len(CASES)


def test_redundant_copies_give_the_same_rows(store):
    """Twice as many physical experts: each pair comes back once, from one of the copies."""
    once = _conform(store, "gloo", "2 attention + 2 shards", torch.float32, redundant=0)
    assert _conform(store, "gloo", "2 attention + 2 shards", torch.float32, redundant=12) == once


def _conform(store, backend, layout, dtype, redundant):
    _key[0] += 1
    return process_world.run(
        exchange_worlds.conform,
        exchange_worlds.num_ranks(layout),
        backend,
        layout,
        dtype,
        redundant,
        store.port,
        f"k{_key[0]}",
    )


_key = [0]


@pytest.mark.parametrize(("how", "kind"), [("kill", "PeerLost"), ("hang", "ExchangeTimeout")])
def test_a_lost_peer_is_an_error_that_names_the_place(store, how, kind):
    with process_world.ProcessWorld(exchange_worlds.lose_a_peer, 3, how, store.port, f"lost-{how}") as world:
        source, shard = world.receive(0), world.receive(1)
    name, ep_rank, layer_id, step_id, epoch, waited_s = source
    assert (name, ep_rank, layer_id, step_id, epoch) == (kind, 1, 2, 5, 7)
    assert waited_s < 5.0  # a bound, not a measurement: nobody waits for ever
    # The other shard ends too: by the source giving up its communicator, or, where both waited, by its own deadline.
    assert shard[0] == "PeerLost" or (how == "hang" and shard[0] == "ExchangeTimeout")
