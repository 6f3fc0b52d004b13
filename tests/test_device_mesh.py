"""Members with device steps as real processes, on CPUs: what a GPU cluster's mesh does about launches, epochs and
deaths, with the NCCL exchange's forms over gloo. On GPUs: test_mesh_gpu.py."""

import mesh_worlds
import pytest
import torch
from test_mesh import QUICK, Cluster, expected


def cluster(roles):
    return Cluster(roles, QUICK, mesh_worlds.device_process)


def check(collected, batches):
    """Sums of 32 products in another order than the host's."""
    want = expected(batches)
    assert [batch_id for batch_id, _, _ in collected] == [batch_id for batch_id, _ in batches]
    for batch_id, output, _ in collected:
        assert isinstance(output, torch.Tensor), output
        assert output.allclose(want[batch_id], rtol=1e-4, atol=1e-4), f"batch {batch_id} differs from the local result"


def count_in(number, collected):
    return sum(epoch == number for _, _, epoch in collected)


@pytest.mark.parametrize("roles", ["ae", "aee", "bb"])
def test_epochs_and_placements_are_entered_under_running_steps(roles):
    """Steps of up to 7 tokens: padded, exact, and two parts of 4. A rebalance, then a new membership."""
    sources = [rank for rank, role in enumerate(roles) if role in "ab"]
    with cluster(roles) as world:
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
        num_tokens = sum(tokens for r, mine in batches.items() for _, tokens in mine[-count_in(3, collected[r]) :])
        assert sum(rows for _, _, _, rows in reports) == num_tokens * mesh_worlds.TOP_K * len(mesh_worlds.LAYERS)
        world.end()


def test_a_killed_peer_is_an_error_and_the_next_epoch_goes_on():
    with cluster("aee") as world:
        world.enter(world.make_epoch(1, 1))
        world.ask(0, "submit", [(1, 4), (2, 4), (3, 2)])
        check(world.ask(0, "collect", 3), [(1, 4), (2, 4), (3, 2)])
        world.ask(2, "die_in_next_step")
        world.ask(0, "submit", [(4, 5)])
        ((batch_id, error, epoch),) = world.ask(0, "collect", 1)
        assert (batch_id, epoch) == (4, 1)
        assert error.startswith("PeerLost")
        assert "PeerLost" in world.ask(0, "report")[1]
        world.enter(world.make_epoch(2, 2, ranks=[0, 1], new_group=True), ranks=[0, 1])
        ((batch_id, output, epoch),) = world.ask(0, "collect", 1)
        assert epoch == 2
        check([(batch_id, output, epoch)], [(4, 5)])


def test_a_member_goes_on_alone_and_is_joined_again():
    with cluster("bbb") as world:
        world.enter(world.make_epoch(1, 1, ranks=[0, 1]), ranks=[0, 1])
        world.ask(0, "submit", [(1, 4), (2, 3)])
        check(world.ask(0, "collect", 2), [(1, 4), (2, 3)])
        world.ask(1, "die_in_next_step")
        world.ask(0, "submit", [(3, 5)])
        ((_, error, _),) = world.ask(0, "collect", 1)
        assert error.startswith("PeerLost")
        world.enter(world.make_epoch(2, 2, ranks=[0], new_group=True), ranks=[0])
        check(world.ask(0, "collect", 1), [(3, 5)])
        _, _, version, rows = world.ask(0, "report")
        assert (version, rows) == (2, 5 * mesh_worlds.TOP_K * len(mesh_worlds.LAYERS))  # alone, counted all the same
        world.enter(world.make_epoch(3, 3, ranks=[0, 2], new_group=True), ranks=[0, 2])
        batches = [(10 + i, 1 + i % 4) for i in range(20)]
        world.ask(0, "submit", batches)
        check(world.ask(0, "collect", 20), batches)
        assert world.ask(2, "report")[0].get(3, 0) > 0


def test_a_member_that_fails_in_its_experts_ends_the_step_of_all_at_once():
    with cluster("aee") as world:
        world.enter(world.make_epoch(1, 1))
        world.ask(2, "break_experts")
        world.ask(0, "submit", [(4, 5)])
        ((_, error, _),) = world.ask(0, "collect", 1)
        assert error.startswith("PeerLost")
        ((_, error, _),) = world.ask(2, "collect", 1)
        assert error.startswith("RuntimeError: a broken expert")
        world.enter(world.make_epoch(2, 1, new_group=True))
        check(world.ask(0, "collect", 1), [(4, 5)])
        world.end()
