"""Members whose rows live on GPUs, as real processes: epochs come and go under running steps, a killed peer is an error
at once. The peer exchange, with all members on one GPU where there are not two; NCCL where there are."""

import time

import mesh_worlds
import pytest
import torch
from test_mesh import Cluster, expected

from expertmesh.config import ExchangeConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
BACKENDS = ["peer", pytest.param("nccl", marks=pytest.mark.skipif(NUM_GPUS < 2, reason="needs 2 GPUs"))]


def cluster(roles, backend, timeout_s=15.0):
    options = ExchangeConfig(
        backend=backend, timeout_base_s=timeout_s, timeout_per_row_s=0.0, epoch_timeout_s=15.0, max_tokens_per_turn=4
    )
    return Cluster(roles, options, mesh_worlds.gpu_process, NUM_GPUS)


def check(collected, batches):
    """Sums of 32 products in another order than the CPU's."""
    want = expected(batches)
    assert [batch_id for batch_id, _, _ in collected] == [batch_id for batch_id, _ in batches]
    for batch_id, output, _ in collected:
        assert isinstance(output, torch.Tensor), output
        assert output.allclose(want[batch_id], rtol=1e-4, atol=1e-4), f"batch {batch_id} differs from the local result"


@pytest.mark.parametrize("roles", ["bb", "ae"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_epochs_and_placements_are_entered_under_running_steps(backend, roles):
    """Steps of up to 7 tokens are two parts of 4. The second epoch is a rebalance, the third a new membership."""
    sources = [rank for rank, role in enumerate(roles) if role in "ab"]
    with cluster(roles, backend) as world:
        world.enter(world.make_epoch(1, 1))
        batches = {r: [(1000 * r + i, 1 + i % 7) for i in range(40)] for r in sources}
        collected = {r: [] for r in sources}
        for r, mine in batches.items():
            world.ask(r, "submit", mine)
            collected[r] += world.ask(r, "collect", 20)
        for number, version, new_group in ((2, 2, False), (3, 3, True)):
            world.enter(world.make_epoch(number, version, new_group=new_group))
            for r, mine in batches.items():
                world.submit_more(r, mine)
            for r, mine in batches.items():
                collected[r] += world.ask(r, "collect", len(mine) - len(collected[r]))
        for r, mine in batches.items():
            check(collected[r], mine)
            assert {epoch for _, _, epoch in collected[r]} == {1, 2, 3}
        reports = world.ask_all("report")
        assert all((troubles, version) == ([], 3) for _, troubles, version, _ in reports)
        assert sum(rows for _, _, _, rows in reports) > 0
        world.end()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_killed_shard_is_noticed_long_before_the_deadline_and_the_next_epoch_goes_on(backend, capsys):
    """Its control connection closes: the exchange is told, though its own deadline is 15 s."""
    with cluster("ab", backend) as world:
        world.enter(world.make_epoch(1, 1))
        world.ask(0, "submit", [(1, 4), (2, 4), (3, 2)])
        check(world.ask(0, "collect", 3), [(1, 4), (2, 4), (3, 2)])
        world.ask(1, "die_in_next_step")
        started = time.perf_counter()
        world.ask(0, "submit", [(4, 5)])
        ((batch_id, error, epoch),) = world.ask(0, "collect", 1)
        noticed_s = time.perf_counter() - started
        assert (batch_id, epoch) == (4, 1)
        assert error.startswith("PeerLost: rank 1 is gone (ep_rank 0, layer")
        assert noticed_s < 3.0
        assert "PeerLost" in world.ask(0, "report")[1]
    with capsys.disabled():
        print(f"\n{backend}: a killed member was noticed after {noticed_s * 1e3:.0f} ms, by its control connection")


def test_a_member_that_goes_on_alone_and_is_joined_again():
    """Colocated: rank 1 dies, rank 0 owns all experts in the next epoch (no exchange), a third process joins it."""
    with cluster("bbb", "auto") as world:
        world.enter(world.make_epoch(1, 1, ranks=[0, 1]), ranks=[0, 1])
        world.ask(0, "submit", [(1, 4), (2, 3)])
        check(world.ask(0, "collect", 2), [(1, 4), (2, 3)])
        world.ask(1, "die_in_next_step")
        world.ask(0, "submit", [(3, 5)])
        ((_, error, _),) = world.ask(0, "collect", 1)
        assert error.startswith("PeerLost")
        world.enter(world.make_epoch(2, 2, ranks=[0], new_group=True), ranks=[0])
        ((batch_id, output, epoch),) = world.ask(0, "collect", 1)
        assert epoch == 2
        check([(batch_id, output, epoch)], [(3, 5)])
        world.enter(world.make_epoch(3, 3, ranks=[0, 2], new_group=True), ranks=[0, 2])
        batches = [(10 + i, 1 + i % 4) for i in range(20)]
        world.ask(0, "submit", batches)
        check(world.ask(0, "collect", 20), batches)
        assert world.ask(2, "report")[0].get(3, 0) > 0


def test_a_member_that_fails_in_its_experts_ends_the_step_of_all_at_once():
    with cluster("ab", "peer") as world:
        world.enter(world.make_epoch(1, 1))
        world.ask(1, "break_experts")
        started = time.perf_counter()
        world.ask(0, "submit", [(4, 5)])
        ((_, error, _),) = world.ask(0, "collect", 1)
        assert error.startswith("PeerLost")
        assert time.perf_counter() - started < 5.0
        ((_, error, _),) = world.ask(1, "collect", 1)
        assert error.startswith("RuntimeError: a broken expert")
        world.enter(world.make_epoch(2, 1, new_group=True))
        check(world.ask(0, "collect", 1), [(4, 5)])
