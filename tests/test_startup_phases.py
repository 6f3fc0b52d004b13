"""Seconds of a start by phase: what is counted, and what is shown while a phase runs."""

import pytest

from expertmesh.startup_phases import StartupPhases


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_phases_of_one_name_add_up_in_the_order_they_began():
    clock = Clock()
    phases = StartupPhases(clock=clock)
    for seconds in (2.0, 4.0):
        with phases.phase("weights"):
            clock.now += seconds
    with phases.phase("kv"):
        clock.now += 0.25
    clock.now += 1.0  # between phases
    assert phases.seconds == {"weights": 6.0, "kv": 0.25}
    assert phases.total_s == 7.25
    phases.note("weights", "1.5 GB/s")
    assert str(phases) == "weights 6.0 s (1.5 GB/s), kv 0.2 s"


def test_a_running_phase_shows_dots_and_one_that_failed_its_seconds():
    clock = Clock()
    phases = StartupPhases(clock=clock)

    def load():
        clock.now += 3.0
        assert str(phases) == "weights ..."
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"), phases.phase("weights"):
        load()
    assert str(phases) == "weights 3.0 s"
