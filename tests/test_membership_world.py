"""All interleavings of a small cluster's epochs, to a depth; and that the exploration would notice what it is for.

The deep run is `python -P -m expertmesh.bench.explore_epochs`."""

import dataclasses

import pytest
import torch

from expertmesh.bench import epoch_world
from expertmesh.bench.epoch_world import Violation, change, end_step, issue_step, record_id
from expertmesh.bench.explore_epochs import SCENARIOS, beginning, explore, walk
from expertmesh.cluster.membership import Membership
from expertmesh.router.placement import Placement

DEPTHS = {
    "silent death": 6,
    "hang in a long step": 6,
    "leave": 6,
    "restart": 6,
    "cut link": 7,
    "start": 5,
    "death": 4,
    "join": 4,
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_interleaving_keeps_one_record_a_step_and_comes_to_serve(scenario):
    found = explore(scenario, depth=DEPTHS.get(scenario, 3), settle_every=10)
    assert not found.violation, found.violation
    assert found.num_states > 100
    assert found.num_settled > 5


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_random_walks_far_from_the_beginning_come_to_serve(scenario):
    found = walk(scenario, num_walks=15, length=100, seed=1)
    assert not found.violation, found.violation


# ---- a core that forgets something is caught


class BlindToFailures(Membership):
    """Tries again without asking who lives."""

    def _prepare_failed(self, *args):
        commands = super()._prepare_failed(*args)
        self._silent.clear()
        return [c for c in commands if type(c).__name__ != "Probe"]


class DeafToTrouble(Membership):
    def _take(self, event, now):
        return [] if type(event).__name__ == "Trouble" else super()._take(event, now)


class SameKey(Membership):
    """Goes on with a communicator that was aborted."""

    def _begin(self, now):
        if self.epoch is not None:
            self._make_key = lambda: self.epoch.rendezvous_key
        return super()._begin(now)


class Hasty(Membership):
    """Commits before everybody has prepared."""

    def _advance(self, now):
        transition = self._transition
        if self.epoch and transition and transition.phase == "prepare" and len(transition.waiting) == 1:
            transition.waiting.clear()
        return super()._advance(now)


@pytest.mark.parametrize(
    ("core", "scenario"),
    [
        (BlindToFailures, "two deaths"),
        (DeafToTrouble, "cut link"),
        (SameKey, "cut link"),
        (Hasty, "two deaths"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_core_that_forgets_something_is_caught(monkeypatch, core, scenario):
    monkeypatch.setattr(epoch_world, "Membership", core)
    found = explore(scenario, depth=4, settle_every=3)
    if not found.violation:
        found = walk(scenario, num_walks=60, length=100)
    assert "=> Violation" in found.violation
    assert len(found.violation.splitlines()) > 1  # the events that lead to it


def test_a_step_by_two_tables_under_one_number_is_caught():
    world = beginning("death")
    epoch = epoch_world.World.records[world.nodes["e2"].committed]
    turned = Placement(9, 3, 3, torch.roll(epoch.placement.physical_to_logical, 1, dims=1))
    other = record_id(dataclasses.replace(epoch, placement=turned))
    change(world, "e2", prepared=frozenset({other}), committed=other, current=other)
    issue_step(world, "a1")
    with pytest.raises(Violation, match="2 different records"):
        end_step(world, "a1")
