"""The figures of `bench/elastic.py`: what a made-up course of shards, streams and tokens must give."""

import pytest

from expertmesh.bench.elastic import phases_of, target_between
from expertmesh.bench.elastic_load import (
    Load,
    Watch,
    mean_busy,
    phase_of,
    seconds_with,
    switches,
    throughput,
    undisturbed,
    waits,
)
from expertmesh.errors import ConfigError

PHASES = ((1, 5.0), (64, 15.0), (1, 5.0))


def course() -> tuple[Load, Watch]:
    """2 shards until 12 s, then 4, each giving 10 tokens a second; seen every 0.2 s."""
    times = [0.2 * i for i in range(126)]
    shards = [(at, 2.0 if at < 12 else 4.0) for at in times]
    busy = [(at, 0.3 if at < 5 else 0.9 if at < 12 else 0.5) for at in times]
    load = Load(client=None, phases=PHASES, began_at=0.0)  # type: ignore[arg-type]  # nothing is asked
    load.answers = [(0, [0.1 * i for i in range(250)]), (1, [12 + 0.1 * i for i in range(80)])]
    return load, Watch(shards=shards, busy=busy, epochs=[(0.0, 1), (12.0, 2)])


def test_a_phase_is_looked_at_once_it_has_settled():
    assert phase_of(PHASES, 64) == (7.0, 19.0)
    assert phase_of(PHASES, 1) == (2.0, 4.0)
    assert phases_of("1:5,64:15,1:5") == PHASES


def test_tokens_are_counted_by_the_shards_that_served_under_many_streams():
    load, seen = course()
    assert throughput(load, seen, 2) == pytest.approx(10.0, rel=0.05)
    assert throughput(load, seen, 4) == pytest.approx(20.0, rel=0.05)
    assert throughput(load, seen, 3) == 0.0
    assert seconds_with(PHASES, seen, 4) == pytest.approx(7.0, abs=0.5)


def test_busy_is_that_of_a_load_and_a_number_of_shards_apart_from_the_reports_of_the_one_before():
    _, seen = course()
    assert mean_busy(PHASES, seen, 2, 1) == pytest.approx(0.3)
    assert mean_busy(PHASES, seen, 2, 64) == pytest.approx(0.9)
    seen.busy = [(at, 0.9 if at < 12.9 else 0.5) for at, _ in seen.busy]  # reported late
    assert mean_busy(PHASES, seen, 4, 64) == pytest.approx(0.5)


def test_the_target_leaves_two_shards_to_one_stream_and_asks_for_four_under_many():
    target = target_between(0.4, 0.8)
    assert 1.05 * 0.4 < target < 0.8 * 2 / 3
    assert 0.5 / 1.15 < target_between(0.5, 0.76) < 0.76 / 1.15  # the two bounds cross: one shard after the other


@pytest.mark.parametrize(("one", "many"), [(0.7, 0.8), (0.0, 0.8), (0.95, 2.0)])
def test_loads_that_keep_shards_alike_busy_give_no_target(one, many):
    with pytest.raises(ConfigError, match="busy"):
        target_between(one, many)


def test_text_that_is_held_back_is_no_stall_and_tokens_that_come_late_together_are_one():
    """Token 2 of every answer goes with token 3; once tokens 5 to 7 come together after a pause."""
    usual = [0.0, 0.1, 0.3, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    late = [20.0, 20.1, 20.3, 20.3, 20.4, 20.7, 20.7, 20.7, 20.8]
    load = Load(client=None, phases=((1, 30.0),), began_at=0.0)  # type: ignore[arg-type]
    load.answers = [(0, usual), (0, [10 + at for at in usual]), (0, late)]
    found = {round(wait.at, 1): wait for wait in waits(load)}
    assert found[20.3].steps(0.1) == pytest.approx(1.0)
    assert found[20.7].steps(0.1) == pytest.approx(3.0)
    assert undisturbed(load, Watch(epochs=[(0.0, 1), (20.5, 2)]))["most"] == pytest.approx(1.0)
    (switch,) = switches(load, Watch(epochs=[(0.0, 1), (20.5, 2)]))
    assert switch["steps"] == pytest.approx(3.0, abs=0.01)
    assert switch["excess_steps"] == pytest.approx(2.0, abs=0.01)
