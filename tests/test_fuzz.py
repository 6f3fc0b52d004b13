"""Promise: whatever bytes a client sends, the answer is a proper stream or a typed error, and nothing is left behind.

Twenty seconds of `make fuzz` from a fixed seed, the cases that once found something first. What needs time (memory over
minutes) is in the ten minutes; that everything comes to rest is checked here too."""

import asyncio

import pytest

from expertmesh.bench import fuzz

SEED, SECONDS = 20_261_122, 20.0


@pytest.mark.timeout(600)  # a busy machine starts and rests slowly
def test_twenty_seconds_of_attacks_find_nothing_and_everything_comes_to_rest():
    report = asyncio.run(fuzz.attack(SECONDS, SEED))
    assert report.findings == []
    assert report.exit_code == 0
    assert report.phases, "it never came to rest"
    assert len(report.answers) > 5, "hardly anything was answered"
    assert report.num_cases > len(fuzz.kept_cases())
