"""The seconds that `make test` ends with: every file counts once, and a ring above its budget says so."""

from pathlib import Path

from rings import RINGS, RingSeconds


def test_every_named_file_is_there_and_in_one_ring():
    here = {path.stem for path in Path(__file__).parent.glob("test_*.py")}
    named = [stem for ring in RINGS for stem in ring.stems]
    assert sorted(named) == sorted(set(named))
    assert set(named) <= here


def test_seconds_add_up_by_ring_and_a_ring_above_its_budget_says_so():
    seconds = RingSeconds()
    seconds.add("test_chaos", 200.0)
    seconds.add("test_elastic", 50.4)
    seconds.add("test_demo_model", 12.0)
    seconds.add("test_somebody_new", 3.0)
    assert seconds.lines() == [
        "demo model: 12 s of at most 60 s",
        "elastic: 250 s of at most 240 s, TOO LONG",
        "rest: 3 s of at most 120 s",
    ]
