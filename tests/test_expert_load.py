"""What a member that owns experts reports of its load, and what a product in plain torch notes of itself."""

import numpy as np
import pytest
import torch

from expertmesh.experts.expert_load import ExpertLoad
from expertmesh.kernels.expert_work import ExpertWork, note_in_torch
from expertmesh.router.epoch import Epoch, Member
from expertmesh.router.placement import uniform

CPU = torch.device("cpu")


class Mesh:
    """One attention member and two shards; this is the second shard, with three of five experts' slots."""

    def __init__(self):
        names = ["attention", "first", "second"]
        members = tuple(Member(member_id=name, attention=i == 0, expert=i > 0) for i, name in enumerate(names))
        self.member = members[2]
        self.epoch = Epoch(number=1, members=members, placement=uniform(2, 5, 2))
        self.version, self.rows = 1, np.zeros((2, 3), dtype=np.int64)

    def load(self):
        return self.version, self.rows


class Experts:
    resident_bytes = 1000

    def __init__(self):
        self.seconds = 5.0  # before anybody looked

    def busy_s(self):
        return self.seconds


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def parts():
    return Mesh(), Experts(), Clock()


def test_the_busy_fraction_is_of_one_window_and_of_both_sides(parts):
    mesh, experts, clock = parts
    load = ExpertLoad(mesh, experts, clock)
    clock.now, experts.seconds = 102.0, 5.5
    assert load.read(0.0)["busy_fraction"] == 0.25  # a GPU: what was before the first look is not in it
    clock.now = 104.0
    assert load.read(0.5)["busy_fraction"] == 0.25  # a CPU
    clock.now = 106.0
    assert load.read(0.0)["busy_fraction"] == 0.0
    clock.now, experts.seconds = 107.0, 7.5
    assert load.read(0.0)["busy_fraction"] == 1.0  # never more, whatever two clocks say
    assert load.busy_s == 2.0


def test_rows_go_on_over_placements_that_count_anew(parts):
    mesh, experts, clock = parts
    load = ExpertLoad(mesh, experts, clock)
    mesh.rows = np.full((2, 3), 7)
    assert load.read(0.0)["num_rows"] == 42
    mesh.version, mesh.rows = 2, np.zeros((2, 3), dtype=np.int64)
    assert load.read(0.0)["num_rows"] == 42
    mesh.rows = np.ones((2, 3), dtype=np.int64)
    assert load.read(0.0) == {
        "num_rows": 48,
        "busy_fraction": 0.0,
        "num_physical_experts": 4,  # two in each of two layers
        "weight_bytes": 1000,
    }


def test_a_member_outside_of_epochs_holds_nothing_and_counts_nothing(parts):
    mesh, experts, clock = parts
    mesh.epoch, mesh.version = None, 0
    load = ExpertLoad(mesh, experts, clock)
    assert load.rows() is None
    assert load.read(0.0)["num_physical_experts"] == 0


def test_rows_are_of_the_placement_that_is_asked_for():
    work = ExpertWork(3, CPU)
    work.count_for(4)
    note_in_torch(work.of(1), torch.tensor([[2, -1], [0, 2]]), took_ns=1500)
    note_in_torch(work.of(1), torch.tensor([[-1, -1]]), took_ns=9000)  # no rows: not busy
    note_in_torch(work.of(2), torch.tensor([[1]]), took_ns=500)
    assert work.rows(4)[:, :4].tolist() == [[0, 0, 0, 0], [1, 0, 2, 0], [0, 1, 0, 0]]
    assert work.busy_s() == pytest.approx(2e-6)
    assert not work.rows(3).any()
    assert not work.rows(5).any()
    work.count_for(5)
    assert not work.rows(4).any()
    assert not work.rows(5).any()
    assert work.busy_s() == pytest.approx(2e-6)  # time goes on
