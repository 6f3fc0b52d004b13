"""Device exchanges between real processes: conformance, graphs, a death in a captured step, growth under traffic.

`peer` also runs with all processes on one GPU, which then takes them in turns. What needs two GPUs says so."""

import exchange_worlds
import process_world
import pytest
import torch

from expertmesh.router.group import RendezvousStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
two_gpus = pytest.mark.skipif(NUM_GPUS < 2, reason="needs 2 GPUs: NCCL refuses two ranks on one")
BACKENDS = ["peer", pytest.param("nccl", marks=two_gpus)]
GRAPHS = [*BACKENDS, pytest.param("nccl bounded", marks=two_gpus)]
_keys = iter(range(1000))


@pytest.fixture(scope="module")
def store():
    return RendezvousStore("127.0.0.1")


def key():
    return f"pair-{next(_keys)}"


@pytest.mark.parametrize("bucket", [0, 48])
@pytest.mark.parametrize("layout", ["2 colocated", "1 attention + 1 shard"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_come_back_from_the_right_expert(store, backend, layout, bucket):
    pairs = process_world.run(
        exchange_worlds.conform_device, 2, backend, layout, bucket, min(NUM_GPUS, 2), store.port, key()
    )
    assert sum(pairs) > 300


@two_gpus
@pytest.mark.parametrize("bucket", [0, 48])
def test_rows_without_a_place_are_told_and_whole_steps_bring_them(store, bucket):
    counted = process_world.run(
        exchange_worlds.conform_bounded, 2, "nccl bounded", "2 colocated", bucket, 2, store.port, key()
    )
    assert sum(pairs for pairs, _ in counted) > 500
    assert (sum(num_overflows for _, num_overflows in counted) > 0) == (bucket == 0)  # 48 rows have room for all cases


@pytest.mark.skipif(NUM_GPUS < 4, reason="needs 4 GPUs")
@pytest.mark.parametrize("layout", ["4 colocated", "2 attention + 2 shards", "mixed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_come_back_among_four(store, backend, layout):
    pairs = process_world.run(exchange_worlds.conform_device, 4, backend, layout, 48, 4, store.port, key())
    assert sum(pairs) > 500


@pytest.mark.parametrize("backend", GRAPHS)
def test_a_captured_step_is_replayed_with_other_rows(store, backend):
    num_steps = 1000 if NUM_GPUS > 1 else 60
    steps = process_world.run(exchange_worlds.graph_steps, 2, backend, min(NUM_GPUS, 2), num_steps, store.port, key())
    assert steps == [1 + num_steps] * 2


@pytest.mark.parametrize("backend", GRAPHS)
def test_a_death_in_a_captured_step_ends_at_the_deadline_and_the_next_epoch_goes_on(store, backend, capsys):
    """Rank 1 is killed while its graph runs. Rank 0's context lives, and a fresh process takes the place."""
    keys = (key(), key())
    arguments = (backend, min(NUM_GPUS, 2), 20, store.port, keys)
    with process_world.ProcessWorld(exchange_worlds.survive, 2, *arguments) as world:
        assert world.receive(0) == "noticed"
        replacement = world.add(1, backend, min(NUM_GPUS, 2), -1, store.port, keys)
        world.connections[0].send("go on")
        name, noticed_s, met_s, hundred_s, _ = world.receive(0)
        world.receive(replacement)
    assert name.startswith("ExchangeTimeout")
    if backend == "peer":
        assert "of rank 1 within 0.5 s (ep_rank 1, layer" in name
    assert noticed_s < 2.0
    with capsys.disabled():
        print(
            f"\n{backend}: noticed after {noticed_s:.3f} s (deadline 0.5), next epoch with a fresh process met in "
            f"{met_s:.2f} s, 100 checked steps in it {hundred_s:.3f} s"
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_next_membership_is_built_while_steps_run(store, backend, capsys):
    arguments = (backend, min(NUM_GPUS, 2), store.port, key())
    measured = process_world.run(exchange_worlds.grow_under_traffic, 2, *arguments)
    with capsys.disabled():
        for took_s, median_s, longest_s in measured:
            print(
                f"\n{backend}: built beside running steps in {took_s:.3f} s; step p50 {median_s * 1e3:.2f} ms, "
                f"longest {longest_s * 1e3:.1f} ms"
            )
    assert max(longest for _, _, longest in measured) < 5.0
