"""The autoscaling policy as readable traces (tests/traces/autoscale_*.txt; `EXPERTMESH_REWRITE_TRACES=1` rewrites
them), and its Serve class without Serve."""

import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.autoscale import (
    ATTENTION,
    LoadWindow,
    ScalePolicy,
    ScaleState,
    ServePolicy,
    attention_pressure,
    decide,
)
from expertmesh.errors import ConfigError
from expertmesh.router.status import ScaleWish

TRACES = Path(__file__).parent / "traces"
POLICY = ScalePolicy(
    target_busy=0.6, hysteresis=0.15, min_shards=2, max_shards=6, upscale_delay_s=2.0, downscale_delay_s=8.0,
    cooldown_s=4.0, give_up_s=30.0, rebalance_delay_s=2.0, rebalance_interval_s=6.0,
)  # fmt: skip
START_S = 3  # from a decision to serving, of a shard in these traces


class Tier:
    """A tier whose shards come and go some seconds after they are asked for; a line where the decision changes."""

    def __init__(self, num_running, policy=POLICY):
        self.policy, self.state, self.now = policy, ScaleState(), 0
        self.running, self.due, self.lines, self.last = num_running, None, [], None
        self.decisions = []

    def run(self, seconds, busy, *, gain=None, fits=1, reports=None, starts=True, note=""):
        """`busy(num_running)` -> the busy fraction of each shard. A rebalance asked for here evens them out."""
        if note:
            self.lines.append(f"       -- {note}")
        for _ in range(seconds):
            if self.due and self.now >= self.due[0] and starts:
                self.running, self.due = self.due[1], None
            fractions = busy(self.running)[:reports]
            window = LoadWindow(
                busy={f"e{i}": f for i, f in enumerate(fractions)}, num_running=self.running, fits=fits,
                predicted_gain=gain,
            )  # fmt: skip
            decision = decide(self.state, window, float(self.now), self.policy)
            if decision.num_shards != self.running and (self.due is None or self.due[1] != decision.num_shards):
                self.due = (self.now + START_S, decision.num_shards)
            shown = (decision.num_shards, decision.reason.split(":")[-1], decision.rebalance)
            if shown != self.last:
                mark = "  rebalance" if decision.rebalance else ""
                self.lines.append(f"{self.now:5}  {decision.num_shards} shards{mark}  {decision.reason}")
                self.last = shown
            self.state, self.now = decision.state, self.now + 1
            self.decisions.append(decision)
            if decision.rebalance:
                return True
        return False

    def check(self, name):
        path, text = TRACES / f"autoscale_{name}.txt", "\n".join(self.lines) + "\n"
        if os.environ.get("EXPERTMESH_REWRITE_TRACES"):
            path.write_text(text)
        assert text == path.read_text()


def even(work):
    """`work` in shards' worth, spread evenly."""
    return lambda n: [min(1.0, work / n)] * n


def skewed(work, share):
    """The first shard does `share` of the work."""
    return lambda n: [min(1.0, work * share)] + [work * (1 - share) / (n - 1)] * (n - 1)


def test_load_up_and_down_again():
    tier = Tier(2)
    tier.run(5, even(0.9), note="0.9 shards' worth of work")
    tier.run(25, even(2.3), note="2.3")
    tier.run(60, even(0.7), note="0.7")
    tier.check("up_and_down")
    assert (max(d.num_shards for d in tier.decisions), tier.running) == (4, 2)


def test_skew_is_answered_by_replication_before_a_shard():
    tier = Tier(4)
    tier.run(3, even(2.1), note="even")
    assert tier.run(10, skewed(2.1, 0.45), gain=1.8, note="one shard does 45 % of the work")
    tier.run(20, even(2.1), note="placed anew")
    tier.check("skew")
    assert {d.num_shards for d in tier.decisions} == {4}


def test_skew_that_stays_gets_a_shard():
    tier = Tier(4)
    assert tier.run(10, skewed(1.8, 0.5), note="one shard does half of the work; nothing is known of a gain")
    tier.run(14, skewed(1.8, 0.5), note="placed anew, and the same")
    tier.check("skew_stays")
    assert tier.running == 5


def test_skew_without_a_promised_gain_gets_a_shard_at_once():
    tier = Tier(4)
    assert not tier.run(30, skewed(1.8, 0.5), gain=1.01, note="the load model knows no better placement")
    tier.check("skew_hopeless")
    assert tier.running == 5


def test_noise_about_the_band_changes_nothing():
    tier = Tier(3)
    for i in range(60):
        tier.run(1, even(1.8 + 0.6 * math.sin(i * 2.1)))
    assert {d.num_shards for d in tier.decisions} == {3}


def test_a_shard_that_never_comes_is_given_up():
    tier = Tier(2)
    tier.run(45, even(2.0), starts=False, note="no machine for a third")
    tier.check("never_comes")
    assert tier.decisions[40].num_shards == 2 or "waiting" in tier.decisions[40].reason


def test_a_death_is_waited_for_not_scaled():
    tier = Tier(4)
    tier.run(4, even(2.4))
    tier.running = 3
    tier.run(4, even(2.4), note="one is dead, Serve starts another")
    tier.running = 4
    tier.run(6, even(2.4), note="it is back")
    tier.check("death")
    assert {d.num_shards for d in tier.decisions} == {4}


def test_one_copy_of_every_expert_is_the_least():
    tier = Tier(4)
    tier.run(40, even(0.1), fits=3, note="idle; 3 shards hold one copy of every expert")
    tier.run(6, even(0.1), fits=4, note="a shard's memory is less now")
    tier.check("fits")
    assert tier.decisions[-1].num_shards == 4


def test_silent_shards_are_waited_for():
    tier = Tier(3)
    tier.run(5, even(3.0), reports=2)
    assert {d.num_shards for d in tier.decisions} == {3}
    assert "2 came" in tier.decisions[-1].reason


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.lists(st.floats(0, 1), max_size=8), st.integers(0, 8), st.floats(0, 30)), max_size=30))
def test_any_history_stays_within_bounds_and_says_why(history):
    state, now = ScaleState(), 0.0
    for busy, num_running, elapsed in history:
        now += elapsed
        window = LoadWindow(busy=dict(enumerate(busy)), num_running=num_running)
        decision = decide(state, window, now, POLICY)
        assert POLICY.min_shards <= decision.num_shards <= POLICY.max_shards
        assert decision.num_shards <= max(2 * state.wanted, num_running, POLICY.min_shards)
        assert decision.reason
        assert decision == decide(state, window, now, POLICY)
        state = decision.state


def context(busy, *, num_running, state, now, **metrics):
    return SimpleNamespace(
        deployment_name="ExpertShard", current_num_replicas=num_running, target_num_replicas=num_running,
        aggregated_metrics={"busy_fraction": busy, **metrics}, policy_state=state, current_time=now,
    )  # fmt: skip


class Link:
    def __init__(self):
        self.told, self.asked = [], None

    def wish(self):
        return self.asked

    def decided(self, told):
        self.told.append(told)


def test_the_serve_class_keeps_its_state_and_its_number():
    link = Link()
    told = link.told
    policy = ServePolicy(target_busy=0.5, upscale_delay_s=1.0, max_shards=4, link=link)
    state, numbers = {}, []
    for now in range(4):
        n, state = policy(context({"a": 0.9, "b": 0.9}, num_running=2, state=state, now=float(now)))
        state = {**state, "decision_counter": 1}  # Serve keeps keys of its own in it
        numbers.append(n)
    assert numbers == [2, 4, 4, 4]  # said again until it is there
    assert [t["num_shards"] for t in told] == [4]
    assert "busy 0.90 of 2 shards" in told[0]["reason"]
    n, _ = policy(context({}, num_running=2, state={}, now=0.0, fits={"a": 3.0}))
    assert n == 3


def test_an_operators_wish_comes_first_and_is_kept_when_the_conductor_forgets_it():
    link = Link()
    policy = ServePolicy(num_shards=2, link=link)
    window = context({"a": 0.01, "b": 0.01}, num_running=2, state=None, now=0.0)
    n, state = policy(window)
    assert n == 2  # fixed, however idle
    link.asked = ScaleWish(num_shards=5, number=1)
    n, state = policy(context({"a": 0.01, "b": 0.01}, num_running=2, state=state, now=1.0))
    assert n == 5
    link.asked = None  # a Conductor that has started again
    n, state = policy(context({"a": 0.01}, num_running=5, state=state, now=2.0))
    assert n == 5
    link.asked = ScaleWish(min_shards=3, max_shards=4, number=2)
    n, state = policy(context({"a": 0.01}, num_running=5, state=state, now=3.0))
    assert n == 4  # automatic within these bounds
    assert "at most 4" in link.told[-1]["reason"]


def test_the_serve_class_travels_without_ray_or_torch():
    policy = pickle.loads(pickle.dumps(ServePolicy(max_shards=3)))
    assert policy(context({"a": 0.1}, num_running=1, state=None, now=0.0))[0] == 1
    code = (
        "import sys, expertmesh.cluster.autoscale\n"
        "heavy = {'ray', 'torch', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_attention_pressure_is_kv_places_or_queue():
    idle = {"num_running": 0, "num_waiting": 0, "num_free_kv_blocks": 100, "num_kv_blocks": 100, "max_num_seqs": 10}
    assert attention_pressure(**idle) == 0
    assert attention_pressure(**{**idle, "num_free_kv_blocks": 25}) == 0.75
    assert attention_pressure(**{**idle, "num_running": 10, "num_waiting": 5}) == 1.5


def test_the_attention_tier_follows_its_pressure_and_never_rebalances():
    link = Link()
    policy = ServePolicy(link=link, target_busy=0.7, upscale_delay_s=1.0, downscale_delay_s=2.0, cooldown_s=0.0,
                         max_shards=4, **ATTENTION)  # fmt: skip
    state, running, numbers = {}, 1, []
    for now, pressures in enumerate([[1.0]] * 3 + [[0.9, 0.5]] * 9 + [[0.0, 0.0]] * 4 + [[0.0]]):
        running = len(pressures)
        number, state = policy(context({}, num_running=running, state=state, now=float(now), pressure=dict(
            enumerate(pressures))))  # fmt: skip
        numbers.append(number)
    assert numbers == [1, 2, 2] + [2] * 9 + [2, 2, 1, 1] + [1]
    assert [told["rebalance"] for told in link.told] == [False, False]
    assert [told["reason"] for told in link.told] == [
        "pressure 1.00 of 1 attention replicas, peak 1.00, target 0.70: 2 attention replicas",
        "pressure 0.00 of 2 attention replicas, peak 0.00, target 0.70: 1 attention replicas are enough",
    ]


@pytest.mark.parametrize("bad", [{"target_busy": 1.0}, {"min_shards": 9}, {"skew": 0.5}, {"hysteresis": 1.0}])
def test_a_senseless_policy_is_refused(bad):
    with pytest.raises(ConfigError, match="autoscaling"):
        ScalePolicy(**bad)
