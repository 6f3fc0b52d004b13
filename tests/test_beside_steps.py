"""Work of an epoch change beside running steps: `router/group.py`'s `beside_steps`, and when the mesh uses it."""

import os
import threading

import pytest
import torch

from expertmesh.errors import CheckpointError, PeerLost
from expertmesh.router.exchange import RowShape
from expertmesh.router.group import beside_steps
from expertmesh.router.local_mesh import LocalMesh
from expertmesh.router.placement import Placement, uniform


def priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


class Experts:
    """LocalExperts that notes how they were placed."""

    def __init__(self) -> None:
        self.placed: list[tuple[int, int]] = []  # (version, priority)

    def set_placement(self, placement: Placement, ep_rank: int) -> None:
        self.placed.append((placement.version, priority()))

    def use_placement(self, version: int) -> None:
        pass

    def forward(self, layer_id: int, rows: torch.Tensor, slot_ids: torch.Tensor) -> torch.Tensor:
        return rows


def test_it_gives_way_and_leaves_its_caller_as_it_was():
    before, seen = priority(), []
    beside_steps(lambda: seen.append(priority()))
    assert seen == [min(19, before + 10)]
    assert priority() == before


def test_what_it_raises_comes_to_its_caller():
    def fail() -> None:
        raise CheckpointError("this file is damaged")

    with pytest.raises(CheckpointError, match="damaged"):
        beside_steps(fail)


def test_experts_are_placed_beside_steps_and_at_once_where_nothing_steps():
    experts, usual = Experts(), priority()
    shape = RowShape(hidden_size=4, top_k=2, dtype=torch.float32, device=torch.device("cpu"))
    mesh = LocalMesh(experts, uniform(1, 4, 1), shape)
    mesh.change_placement(uniform(1, 4, 1, version=2))
    mesh._trouble(mesh.epoch.number, PeerLost("gone", ep_rank=0, layer_id=0, step_id=1, epoch=2, peer=1))
    mesh.change_placement(uniform(1, 4, 1, version=3))
    mesh.change_placement(uniform(1, 4, 1, version=4))
    mesh.close()
    assert experts.placed == [(1, usual), (2, min(19, usual + 10)), (3, usual), (4, min(19, usual + 10))]
