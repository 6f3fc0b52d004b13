"""Members as real processes: a toy MoE model over gloo gives, bit for bit, what one process gives; epochs come and go
under running steps; a killed peer is an error, not a hang."""

import secrets

import mesh_worlds
import process_world
import psutil
import pytest
import torch

from expertmesh.config import ExchangeConfig
from expertmesh.errors import EpochError
from expertmesh.router.epoch import Epoch, StepHeader
from expertmesh.router.local_mesh import LocalMesh

QUICK = ExchangeConfig(timeout_base_s=20.0, timeout_per_row_s=0.0, epoch_timeout_s=20.0)


class Cluster(process_world.ProcessWorld):
    """The Conductor's part, by hand: prepare on all, then commit on all."""

    def __init__(
        self, roles: str, exchange: ExchangeConfig = QUICK, process=mesh_worlds.member_process, *arguments: int
    ) -> None:
        super().__init__(process, len(roles), roles, exchange, *arguments)
        self.roles = roles
        self.members = self.ask_all("member")
        self.key = self.leader_id = ""

    def ask(self, rank, method, *args):
        self.connections[rank].send((method, args))
        return self.receive(rank)

    def ask_all(self, method, *args, ranks=None):
        ranks = range(len(self.connections)) if ranks is None else ranks
        for rank in ranks:
            self.connections[rank].send((method, args))
        return [self.receive(rank) for rank in ranks]

    def make_epoch(self, number, placement_version, *, ranks=None, new_group=False):
        ranks = range(len(self.members)) if ranks is None else ranks
        members = tuple(self.members[rank] for rank in ranks)
        leader = next(m for m in members if m.attention)
        if new_group or not self.key:
            self.key = secrets.token_hex(8)
        return Epoch(
            number=number,
            members=members,
            placement=mesh_worlds.placement(sum(m.expert for m in members), placement_version),
            rendezvous_key=self.key,
            store_host=leader.host,
            store_port=leader.store_port,
        )

    def enter(self, epoch, ranks=None):
        assert self.ask_all("prepare", epoch, ranks=ranks) == [None] * len(epoch.members)
        everybody = list(range(len(self.connections)) if ranks is None else ranks)
        # The leader in force is told first: its last step ends before another member leads.
        first = [r for r in everybody if self.members[r].member_id == self.leader_id]
        assert self.ask_all("commit", epoch.number, ranks=first) == [None] * len(first)
        others = [r for r in everybody if r not in first]
        assert self.ask_all("commit", epoch.number, ranks=others) == [None] * len(others)
        self.leader_id = epoch.members[epoch.leader_rank].member_id

    def submit_more(self, rank, batches):
        """Enough to be sure that some run in the epoch that was just committed."""
        more = [(batches[-1][0] + 1 + i, 1 + i % 3) for i in range(30)]
        batches += more
        self.ask(rank, "submit", more)

    def end(self):
        for connection in self.connections:
            connection.send(("end", ()))
        assert self.results() == [None] * len(self.connections)
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(timeout=20)
            assert process.exitcode == 0, "the member did not end by itself"


def expected(batches):
    """One process, both roles."""
    local = LocalMesh(mesh_worlds.TinyExperts(), mesh_worlds.placement(1, 1), mesh_worlds.SHAPE)
    headers = []
    local.start(headers.append)
    outputs = {}
    for batch_id, num_tokens in batches:
        local.bid(num_tokens, 0)
        outputs[batch_id] = mesh_worlds.toy_model(local.enter(headers.pop()), batch_id, num_tokens)
    assert headers == []
    local.close()
    return outputs


def check(collected, batches):
    want = expected(batches)
    assert [batch_id for batch_id, _, _ in collected] == [batch_id for batch_id, _ in batches]
    for batch_id, output, _ in collected:
        assert isinstance(output, torch.Tensor), output
        assert output.equal(want[batch_id]), f"batch {batch_id} differs from the local result"


@pytest.mark.parametrize("roles", ["ae", "aaee", "bb"])
def test_every_layout_equals_the_local_result_bit_for_bit(roles):
    with Cluster(roles) as cluster:
        cluster.enter(cluster.make_epoch(1, 1))
        batches = {
            r: [(100 * r + i, 1 + (3 * i + r) % 7) for i in range(12)] for r in range(len(roles)) if roles[r] in "ab"
        }
        for rank, mine in batches.items():
            cluster.ask(rank, "submit", mine)
        for rank, mine in batches.items():
            check(cluster.ask(rank, "collect", len(mine)), mine)
        rows = sum(report[3] for report in cluster.ask_all("report"))
        tokens = sum(n for mine in batches.values() for _, n in mine)
        assert rows == tokens * mesh_worlds.TOP_K * len(mesh_worlds.LAYERS)
        cluster.end()


def test_epochs_with_other_placements_are_entered_under_running_steps():
    with Cluster("aaee") as cluster:
        cluster.enter(cluster.make_epoch(1, 1))
        batches = {rank: [(1000 * rank + i, 1 + i % 5) for i in range(40)] for rank in (0, 1)}
        collected = {0: [], 1: []}
        for rank, mine in batches.items():
            cluster.ask(rank, "submit", mine)
            collected[rank] += cluster.ask(rank, "collect", 20)
        cluster.enter(cluster.make_epoch(2, 2))
        for rank, mine in batches.items():
            cluster.submit_more(rank, mine)
        for rank, mine in batches.items():
            collected[rank] += cluster.ask(rank, "collect", len(mine) - 40)
        cluster.enter(cluster.make_epoch(3, 3, new_group=True))
        for rank, mine in batches.items():
            cluster.submit_more(rank, mine)
        for rank, mine in batches.items():
            collected[rank] += cluster.ask(rank, "collect", len(mine) - len(collected[rank]))
            check(collected[rank], mine)
            epochs = [epoch for _, _, epoch in collected[rank]]
            assert epochs == sorted(epochs)
            assert set(epochs) == {1, 2, 3}
        for steps, troubles, version, rows in cluster.ask_all("report"):
            assert set(steps) == {1, 2, 3}
            assert (troubles, version) == ([], 3)
            assert rows >= 0
        cluster.end()


def test_a_killed_peer_is_an_error_and_the_next_epoch_goes_on():
    with Cluster("aee") as cluster:
        cluster.enter(cluster.make_epoch(1, 1))
        cluster.ask(0, "submit", [(1, 4), (2, 4), (3, 2)])
        check(cluster.ask(0, "collect", 3), [(1, 4), (2, 4), (3, 2)])
        cluster.ask(2, "die_in_next_step")
        cluster.ask(0, "submit", [(4, 5)])
        ((batch_id, error, epoch),) = cluster.ask(0, "collect", 1)
        assert (batch_id, epoch) == (4, 1)
        assert error.startswith("PeerLost")
        assert "ep_rank 1, layer 1, step 4, epoch 1" in error
        assert "PeerLost" in cluster.ask(0, "report")[1]
        cluster.enter(cluster.make_epoch(2, 2, ranks=[0, 1], new_group=True), ranks=[0, 1])
        ((batch_id, output, epoch),) = cluster.ask(0, "collect", 1)
        assert epoch == 2
        check([(batch_id, output, epoch)], [(4, 5)])


def test_leadership_moves_with_the_epoch():
    """The old leader is told first and leaves when its step is over; the new one leads both, then one alone."""
    with Cluster("aaee") as cluster:
        first = cluster.make_epoch(1, 1)
        cluster.enter(first)
        batches = {rank: [(1000 * rank + i, 2) for i in range(60)] for rank in (0, 1)}
        for rank, mine in batches.items():
            cluster.ask(rank, "submit", mine)
        got = {rank: cluster.ask(rank, "collect", 20) for rank in (0, 1)}
        turned = cluster.make_epoch(2, 2, ranks=[1, 0, 3, 2], new_group=True)
        cluster.enter(turned, ranks=[0, 1, 2, 3])
        for rank, mine in batches.items():
            cluster.submit_more(rank, mine)
        for rank, mine in batches.items():
            got[rank] += cluster.ask(rank, "collect", len(mine) - 20)
            check(got[rank], mine)
        assert {epoch for _, _, epoch in got[1]} == {1, 2}
        cluster.end()


def test_an_absent_member_fails_the_preparation_and_the_epoch_in_force_serves_on():
    brief = ExchangeConfig(timeout_base_s=20.0, timeout_per_row_s=0.0, epoch_timeout_s=1.0)
    with Cluster("aee", brief) as cluster:
        cluster.enter(cluster.make_epoch(1, 1, ranks=[0, 1]), ranks=[0, 1])
        wider = cluster.make_epoch(2, 1, new_group=True)
        answers = cluster.ask_all("prepare", wider, ranks=[0, 1])  # the third is never asked
        assert all("no communicator of 3 members within 1 s" in answer for answer in answers)
        cluster.ask_all("rollback", 2, ranks=[0, 1])
        cluster.ask(0, "submit", [(7, 3)])
        check(cluster.ask(0, "collect", 1), [(7, 3)])
        cluster.end()


def test_a_step_takes_long_after_half_of_the_exchanges_deadline(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("expertmesh.router.mesh.monotonic", lambda: now[0])
    local = LocalMesh(mesh_worlds.TinyExperts(), mesh_worlds.placement(1, 1), mesh_worlds.SHAPE)
    headers = []
    local.start(headers.append)
    local.bid(1, 0)
    step = local.enter(headers[0])
    now[0] += ExchangeConfig().timeout_base_s / 2 - 0.1
    assert local.long_step() is None
    now[0] += 0.2
    assert local.long_step() == (1, 1)
    step.serve()
    assert local.long_step() is None


def test_stale_and_unknown_headers_are_refused():
    local = LocalMesh(mesh_worlds.TinyExperts(), mesh_worlds.placement(1, 1), mesh_worlds.SHAPE)
    headers = []
    local.start(headers.append)
    local.bid(1, 0)
    local.enter(headers[0]).serve()
    with pytest.raises(EpochError, match="step 1 after step 1"):
        local.enter(headers[0])
    with pytest.raises(EpochError, match="epoch 9"):
        local.enter(StepHeader(step_id=9, epoch=9, placement_version=1, num_tokens=(1,)))
    local.change_placement(mesh_worlds.placement(1, 2))
    local.bid(1, 0)
    local.enter(headers[1]).serve()
    with pytest.raises(EpochError, match="epoch 1"):
        local.enter(StepHeader(step_id=9, epoch=1, placement_version=1, num_tokens=(1,)))
    local.close()


def test_a_bid_is_answered_once_and_never_more_than_asked():
    local = LocalMesh(
        mesh_worlds.TinyExperts(), mesh_worlds.placement(1, 1), mesh_worlds.SHAPE, max_prefill_tokens_per_step=10
    )
    headers = []
    local.start(headers.append)
    local.bid(3, 25)
    local.bid(2, 4)  # the first is answered; this one waits for its step to end
    assert [h.num_tokens for h in headers] == [(13,)]
    local.enter(headers[0]).serve()
    local.bid(0, 0)
    assert [h.num_tokens for h in headers] == [(13,), (6,)]
    local.enter(headers[1]).serve()
    assert len(headers) == 2
    local.close()


def test_a_member_that_fails_in_its_experts_ends_the_step_of_all_at_once():
    """Its peers must not wait for their deadline (20 s here): the communicator is given up."""
    with Cluster("aee") as cluster:
        cluster.enter(cluster.make_epoch(1, 1))
        cluster.ask(2, "break_experts")
        cluster.ask(0, "submit", [(4, 5)])
        ((_, error, _),) = cluster.ask(0, "collect", 1)
        assert error.startswith("PeerLost")
        ((_, error, _),) = cluster.ask(2, "collect", 1)
        assert error.startswith("RuntimeError: a broken expert")
        cluster.enter(cluster.make_epoch(2, 1, new_group=True))
        check(cluster.ask(0, "collect", 1), [(4, 5)])
        cluster.end()


def test_a_batch_larger_than_the_header_allows_ends_the_step():
    """A header's count bounds the buffers of every peer: more rows are an error here, and no peer is left waiting."""
    local = LocalMesh(mesh_worlds.TinyExperts(), mesh_worlds.placement(1, 1), mesh_worlds.SHAPE)
    headers = []
    local.start(headers.append)
    local.bid(2, 0)
    with pytest.raises(EpochError, match="3 tokens in layer 1, 2 are allowed"):
        mesh_worlds.toy_model(local.enter(headers.pop()), 1, 3)
    local.bid(3, 0)
    mesh_worlds.toy_model(local.enter(headers.pop()), 1, 3)
    local.close()


def test_every_listening_socket_is_bound_to_the_configured_interface():
    with Cluster("ae") as cluster:
        cluster.enter(cluster.make_epoch(1, 1))
        listening = [
            connection.laddr.ip
            for process in cluster.processes
            for connection in psutil.Process(process.pid).net_connections(kind="tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert len(listening) >= 3  # control, rendezvous, gloo
        assert set(listening) == {"127.0.0.1"}
        cluster.end()
