"""A step whose rows stay on the device, here with the CPU as the device: same rows as the host's step, same order of
turns, and its two ends."""

import mesh_worlds
import pytest
import torch

from expertmesh.errors import EpochError, GuardError
from expertmesh.router.control import Kind, encode_done
from expertmesh.router.device_exchange import LocalDeviceExchange, Verdict
from expertmesh.router.device_step import DeviceStep
from expertmesh.router.epoch import Epoch, StepHeader
from expertmesh.router.guard import BadRow, Direction, Fault, Guard
from expertmesh.router.leader import StepDone
from expertmesh.router.local_mesh import LocalMesh

CPU = torch.device("cpu")


class CapturableExperts(mesh_worlds.TinyExperts):
    capturable, graph_version = True, 3


class DeviceMesh(LocalMesh):
    """Takes the device's route without one."""

    def _build_exchange(self, epoch: Epoch, rank: int) -> LocalDeviceExchange:
        return LocalDeviceExchange(CPU)


def run(mesh_type, placement, batch_id, num_tokens):
    mesh = mesh_type(CapturableExperts(), placement, mesh_worlds.SHAPE)
    headers = []
    mesh.start(headers.append)
    mesh.bid(num_tokens, 0)
    step = mesh.enter(headers.pop())
    out = mesh_worlds.toy_model(step, batch_id, num_tokens)  # finishes a device step
    mesh.close()
    return out


@pytest.mark.parametrize("version", [1, 2])
def test_a_device_step_gives_what_the_host_step_gives(version):
    """Version 2 shuffles the slots and has experts twice: ids go through the table."""
    placement = mesh_worlds.placement(1, version)
    for num_tokens in (1, 5):
        want = run(LocalMesh, placement, num_tokens, num_tokens)
        assert run(DeviceMesh, placement, num_tokens, num_tokens).allclose(want, rtol=1e-6, atol=1e-6)


def test_a_failure_that_is_told_late_spares_the_epoch_that_is_being_entered(monkeypatch):
    """Another rank gave up step 1; its word comes while this one is on its way from there into the next epoch."""
    mesh = DeviceMesh(CapturableExperts(), mesh_worlds.placement(1, 1), mesh_worlds.SHAPE)
    headers = []
    mesh.start(headers.append)
    mesh.bid(2, 0)
    mesh_worlds.toy_model(mesh.enter(headers.pop()), 2, 2)
    mesh.change_placement(mesh_worlds.placement(1, 2))
    exchange, aborted, heard = mesh._current.exchange, [], []
    use = exchange.use_placement

    def use_and_hear(placement):
        use(placement)
        mesh._on_frame("e1", Kind.DONE, encode_done(StepDone("e1", 1, failed=True)))
        heard.append(placement.version)

    monkeypatch.setattr(exchange, "use_placement", use_and_hear)
    monkeypatch.setattr(exchange, "abort", lambda: aborted.append(1))
    mesh.bid(2, 0)
    mesh_worlds.toy_model(mesh.enter(headers.pop()), 2, 2)
    assert (heard, aborted) == ([2], [])
    mesh.close()


def make_step(launched, done, num_tokens=2, guard=None):
    exchange = LocalDeviceExchange(CPU)
    placement = mesh_worlds.placement(1, 1)
    exchange.use_placement(placement)
    experts = CapturableExperts()
    experts.set_placement(placement, 0)
    header = StepHeader(step_id=1, epoch=1, placement_version=1, num_tokens=(num_tokens,), bucket=4)
    return DeviceStep(
        header,
        rank=0,
        placement=placement,
        exchange=exchange,
        experts=experts,
        shape=mesh_worlds.SHAPE,
        on_launched=lambda: launched.append(1),
        on_done=done.append,
        guard=guard,
    )


def test_launched_comes_with_the_last_turn_and_done_with_finish():
    launched, done = [], []
    step = make_step(launched, done)
    for layer_id in mesh_worlds.LAYERS:  # 4 rows: padded to the bucket
        step.rows(layer_id, torch.randn(4, mesh_worlds.HIDDEN), torch.zeros(4, 4, dtype=torch.int32))
    assert (launched, done) == ([1], [])
    step.finish()
    step.finish()
    assert (launched, done) == ([1], [None])


def test_what_ran_ahead_of_a_step_with_bad_rows_is_not_judged():
    """Its rows follow from the bad ones: one incident is one replay."""
    guard, bad = Guard(), BadRow(fault=Fault.NOT_FINITE, direction=Direction.RETURN, source=0, ep_rank=0, layer_id=1)
    first, second = (make_step([], [], guard=guard) for _ in range(2))
    for step in (first, second):
        step._exchange.verdict = lambda: Verdict((bad,))
        step.replayed()
    with pytest.raises(GuardError):
        first.finish()
    second.finish()
    assert (guard.attempt, guard.num_replays) == (1, 1)


def test_a_replayed_graph_stands_for_all_turns():
    launched, done = [], []
    step = make_step(launched, done)
    step.replayed()
    step.finish()
    assert (launched, done) == ([1], [None])


def test_a_rank_without_work_takes_the_turns_that_are_left():
    launched, done = [], []
    step = make_step(launched, done)
    step.rows(mesh_worlds.LAYERS[0], torch.randn(2, mesh_worlds.HIDDEN), torch.zeros(2, 4, dtype=torch.int32))
    step.serve()
    assert (launched, done) == ([1], [None])


def test_a_step_left_halfway_or_out_of_turn_is_an_error():
    launched, done = [], []
    step = make_step(launched, done)
    with pytest.raises(EpochError, match="layer 2 out of turn"):
        step.rows(2, torch.randn(2, mesh_worlds.HIDDEN), torch.zeros(2, 4, dtype=torch.int32))
    assert isinstance(done[0], EpochError)
    step = make_step(launched, done := [])
    with pytest.raises(EpochError, match="5 rows in layer 1, 4 are allowed"):
        step.rows(1, torch.randn(5, mesh_worlds.HIDDEN), torch.zeros(5, 4, dtype=torch.int32))
    step = make_step(launched, done := [])
    step.close()
    assert launched == []
    assert len(done) == 1


def test_the_key_of_a_graph_changes_with_exchange_pools_and_bucket():
    one, two = make_step([], []), make_step([], [])
    assert one.graph_key is not None
    assert one.graph_key != two.graph_key  # another exchange object: other addresses
    assert one.graph_key == one._key()
    one._experts.graph_version = 4
    assert one.graph_key != one._key()
    before, one.stride = one._key(), one.stride + 1
    assert one._key() == before, "with one rank a layer is the same in every bucket's step"
    one._exchange.capacity = 8
    assert one._key() != before
    one._experts.capturable = False
    assert one._key() is None
