"""How many replicas a tier should have, whether its experts should be placed anew, and why: `decide` is pure.

Signal of a shard: busy fraction, the time it computes rows / wall. Waiting in lock-step is not busy, so a tier that
waits for one hot shard has a low mean and a high peak: skew. Skew is answered by replication (`rebalance`), which costs
copies but no machine; a shard is added only when the mean is too high, or when skew stays after a rebalance. Work that
is too much on the whole is not helped by replication, and the placement of a newcomer is balanced anyway.

The steadiness is in the state: a load must stay outside the band target * (1 +- hysteresis) for a delay, a change is
followed by a cooldown, growth is at most a doubling, shrinking one shard at a time (each drain moves its experts). The
wanted number is said until it is reached or given up: Serve applies delays of its own to a policy (set them to 0), and
would forget a number said only once.

The attention tier is decided by the same function: busy is `attention_pressure`, KV in use or places taken and what
waits for them. Gateways keep what finds no place (`waiting_room.py`), so a full tier shows as a pressure near 1.

`ServePolicy` is the class given to Serve's AutoscalingPolicy. It runs in Serve's controller, so this module imports
neither Ray nor torch. Idea: the target tracking of Kubernetes' horizontal autoscaler."""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

from ..errors import ConfigError
from ..router.status import ScaleWish

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePolicy:
    target_busy: float = 0.6
    hysteresis: float = 0.15  # part of the target on each side that is left alone
    min_shards: int = 1
    max_shards: int = 8
    upscale_delay_s: float = 2.0
    downscale_delay_s: float = 30.0
    cooldown_s: float = 10.0  # after a change of the number has arrived
    give_up_s: float = 120.0  # for a wanted number that does not come: no machine, or a start that fails
    skew: float = 1.3  # peak / mean above which experts are placed anew
    rebalance_gain: float = 1.05  # and the gain that the load model must promise, where it is known
    rebalance_delay_s: float = 2.0
    rebalance_interval_s: float = 15.0  # a rebalance shows in the windows after it
    idle_busy: float = 0.05  # below this mean, proportions are noise
    unit: str = "shards"  # how reasons call what is counted, and what is measured of it
    measure: str = "busy"

    def __post_init__(self) -> None:
        if not 0 < self.target_busy < 1:
            raise ConfigError("autoscaling.target_busy", self.target_busy, "between 0 and 1")
        if not 0 <= self.hysteresis < 1:
            raise ConfigError("autoscaling.hysteresis", self.hysteresis, "0 to below 1")
        if not 1 <= self.min_shards <= self.max_shards:
            raise ConfigError("autoscaling.min_shards", self.min_shards, f"1 to max_shards ({self.max_shards})")
        if self.skew < 1:
            raise ConfigError("autoscaling.skew", self.skew, "1 or more; it is peak / mean")

    @property
    def high(self) -> float:
        return self.target_busy * (1 + self.hysteresis)

    @property
    def low(self) -> float:
        return self.target_busy * (1 - self.hysteresis)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadWindow:
    """What the replicas reported over the last window."""

    busy: Mapping[str, float]  # replica -> busy fraction
    num_running: int
    fits: int = 1  # fewest shards that hold one copy of every expert (`eplb.min_shards`)
    predicted_gain: float | None = None  # of a rebalance, by the load model; None = not known

    @property
    def mean(self) -> float:
        return sum(self.busy.values()) / len(self.busy) if self.busy else 0.0

    @property
    def peak(self) -> float:
        return max(self.busy.values(), default=0.0)

    @property
    def skew(self) -> float:
        return self.peak / self.mean if self.mean > 0 else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleState:
    """Between two decisions. Times are on the caller's clock; None = not so now, or not yet."""

    wanted: int = 0  # 0 = nothing decided yet: take over what runs
    wanted_at: float | None = None  # when it was last changed; None once it has arrived
    changed_at: float | None = None  # when it last arrived
    high_since: float | None = None
    low_since: float | None = None
    skew_since: float | None = None
    rebalanced_at: float | None = None
    num_vain: int = 0  # rebalances in a row that left the skew
    skew_peak: float | None = None  # when a shard was added because of skew; another needs a lower one


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    num_shards: int
    reason: str
    rebalance: bool = False
    state: ScaleState = field(default_factory=ScaleState)  # for the next call


def decide(state: ScaleState, window: LoadWindow, now: float, policy: ScalePolicy) -> Decision:
    state = _observe(state, window, now, policy)
    fewest = max(policy.min_shards, window.fits)
    most = max(policy.max_shards, fewest)
    if state.wanted < fewest:
        return _want(state, fewest, now, f"{fewest} {policy.unit} are the least that hold every expert")
    if state.wanted > most:
        return _want(state, most, now, f"at most {most} {policy.unit} are allowed")
    if state.wanted_at is not None:
        return _hold(state, f"waiting for {state.wanted} {policy.unit}, {window.num_running} run")
    if len(window.busy) < window.num_running or not window.busy:
        came = f"waiting for reports of {window.num_running} {policy.unit}, {len(window.busy)} came"
        return _hold(state, came)
    cooling = state.changed_at is not None and now - state.changed_at < policy.cooldown_s
    seen = f"{policy.measure} {window.mean:.2f} of {window.num_running} {policy.unit}, peak {window.peak:.2f}"
    if (grown := _grow(state, window, now, policy, most)) and not cooling:
        return _want(state, grown, now, f"{seen}, target {policy.target_busy:.2f}: {grown} {policy.unit}")
    if state.skew_since is not None:
        return _answer_skew(state, window, now, policy, most, cooling, seen)
    if (shrunk := _shrink(state, window, now, policy, fewest)) and not cooling:
        enough = f"{seen}, target {policy.target_busy:.2f}: {shrunk} {policy.unit} are enough"
        return _want(state, shrunk, now, enough)
    return _hold(state, _why_not(state, window, policy, fewest, most, cooling, seen))


def _observe(state: ScaleState, window: LoadWindow, now: float, policy: ScalePolicy) -> ScaleState:
    """Since when the load is outside the band, and whether the wanted number has come."""
    wanted, wanted_at, changed_at = state.wanted or window.num_running, state.wanted_at, state.changed_at
    if wanted_at is None and state.wanted and window.num_running != wanted:
        wanted_at = now  # a death, or somebody's own scaling: it comes back or is taken over
    elif wanted_at is not None and window.num_running == wanted:
        wanted_at, changed_at = None, now
    elif wanted_at is not None and now - wanted_at >= policy.give_up_s:
        wanted, wanted_at, changed_at = window.num_running, None, now
    complete = bool(window.busy) and len(window.busy) >= window.num_running and wanted_at is None
    worth_it = window.predicted_gain is None or window.predicted_gain >= policy.rebalance_gain
    skewed = complete and window.mean >= policy.idle_busy and window.skew > policy.skew
    return replace(
        state,
        wanted=wanted,
        wanted_at=wanted_at,
        changed_at=changed_at,
        high_since=_since(state.high_since, complete and window.mean > policy.high, now),
        low_since=_since(state.low_since, complete and not skewed and window.mean < policy.low, now),
        skew_since=_since(state.skew_since, skewed and (worth_it or window.peak > policy.high), now),
        num_vain=state.num_vain if skewed or not complete else 0,
        skew_peak=state.skew_peak if skewed or not complete else None,
    )


def _since(before: float | None, holds: bool, now: float) -> float | None:
    if not holds:
        return None
    return now if before is None else before


def _grow(state: ScaleState, window: LoadWindow, now: float, policy: ScalePolicy, most: int) -> int:
    """The larger number, 0 = none."""
    if state.high_since is None or now - state.high_since < policy.upscale_delay_s:
        return 0
    needed = _needed(window, policy)
    grown = min(max(needed, state.wanted + 1), 2 * state.wanted, most)
    return grown if grown > state.wanted else 0


def _shrink(state: ScaleState, window: LoadWindow, now: float, policy: ScalePolicy, fewest: int) -> int:
    """One less if the rest stays within the band without it, 0 = none."""
    if state.low_since is None or now - state.low_since < policy.downscale_delay_s or state.wanted <= fewest:
        return 0
    fewer = state.wanted - 1
    return fewer if window.mean * window.num_running / fewer <= policy.target_busy else 0


def _answer_skew(
    state: ScaleState, window: LoadWindow, now: float, policy: ScalePolicy, most: int, cooling: bool, seen: str
) -> Decision:
    """Place anew; a shard more when that was in vain and the hot shard is too busy."""
    assert state.skew_since is not None
    skew = f"{seen}, skew {window.skew:.2f}"
    since = math.inf if state.rebalanced_at is None else now - state.rebalanced_at
    if now - state.skew_since < policy.rebalance_delay_s:
        return _hold(state, f"{skew}: rebalance if it lasts")
    if since < policy.rebalance_interval_s:
        return _hold(state, f"{skew}: waiting for the rebalance to show")
    helps = window.predicted_gain is None or window.predicted_gain >= policy.rebalance_gain
    if helps and state.num_vain == 0:
        state = replace(state, rebalanced_at=now, num_vain=1)
        gain = "" if window.predicted_gain is None else f", {window.predicted_gain:.2f} x predicted"
        return Decision(num_shards=state.wanted, reason=f"{skew}: rebalance{gain}", rebalance=True, state=state)
    if window.peak > policy.high and state.wanted < most and not cooling:
        if state.skew_peak is not None and window.peak > 0.95 * state.skew_peak:
            return _hold(state, f"{skew}: a shard more did not cool the peak")
        why = "stays after a rebalance" if state.num_vain else "no rebalance helps"
        state = replace(state, num_vain=0, skew_peak=window.peak)
        return _want(state, state.wanted + 1, now, f"{skew} {why}: {state.wanted + 1} {policy.unit}")
    if helps and window.peak <= policy.high and since >= 4 * policy.rebalance_interval_s:
        state = replace(state, num_vain=0)  # not urgent: again at leisure
    return _hold(state, f"{skew}: no rebalance helps")


def _needed(window: LoadWindow, policy: ScalePolicy) -> int:
    """Shards that would bring the mean to the target, if work spreads evenly."""
    return math.ceil(window.mean * window.num_running / policy.target_busy - 1e-9)


def _why_not(
    state: ScaleState, window: LoadWindow, policy: ScalePolicy, fewest: int, most: int, cooling: bool, seen: str
) -> str:
    if state.high_since is not None:
        if state.wanted >= most:
            return f"{seen}: {most} {policy.unit} are the most allowed"
        return f"{seen}: {'cooling down' if cooling else 'more if it lasts'}"
    if state.low_since is not None:
        if state.wanted <= fewest:
            return f"{seen}: {fewest} {policy.unit} are the least"
        if window.mean * window.num_running / (state.wanted - 1) > policy.target_busy:
            return f"{seen}: one less would be above the target"
        return f"{seen}: {'cooling down' if cooling else 'fewer if it lasts'}"
    return f"{seen}: within the band"


def _want(state: ScaleState, num_shards: int, now: float, reason: str) -> Decision:
    state = replace(state, wanted=num_shards, wanted_at=now, high_since=None, low_since=None, skew_since=None)
    return Decision(num_shards=num_shards, reason=reason, state=state)


def _hold(state: ScaleState, reason: str) -> Decision:
    return Decision(num_shards=state.wanted, reason=reason, state=state)


def attention_pressure(
    *, num_running: int, num_waiting: int, num_free_kv_blocks: int, num_kv_blocks: int, max_num_seqs: int
) -> float:
    """The busy fraction of an attention replica: KV in use or places taken, and beyond 1 what waits for them."""
    used = 1 - num_free_kv_blocks / num_kv_blocks if num_kv_blocks else 0.0
    return max(used, num_running / max_num_seqs) + num_waiting / max_num_seqs


# Of the attention tier: no experts to place anew, and its replicas are not held to one another's load.
ATTENTION = {"metric": "pressure", "measure": "pressure", "unit": "attention replicas", "skew": 1e9}


class PolicyLink(Protocol):
    """Who is told of decisions and knows what an operator asked for (`conductor_client.PolicyLink`)."""

    def wish(self) -> ScaleWish | None: ...

    def decided(self, told: dict[str, Any]) -> None: ...


class ServePolicy:
    """Serve calls it every control-loop turn with its AutoscalingContext and keeps the returned dictionary.

    `metric` is a name in the replicas' `record_autoscaling_stats`. `fits` and `predicted_gain` are read from metrics of
    those names where the replicas report them. `link` (picklable) is told of every change of mind, for status and
    telemetry, and of rebalances, which the Conductor carries out; what an operator asks for through it comes first.
    `num_shards` > 0: that number as long as nobody asks for another."""

    def __init__(
        self, metric: str = "busy_fraction", link: PolicyLink | None = None, num_shards: int = 0, **policy: Any
    ) -> None:
        self._metric, self._link, self._num_shards, self._policy = metric, link, num_shards, ScalePolicy(**policy)

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        before = dict(ctx.policy_state or {})
        asked = self._asked(before)
        num_shards = asked["num_shards"] if asked else self._num_shards
        if num_shards:
            return num_shards, {**before, "asked": asked}
        known = {f.name: before[f.name] for f in fields(ScaleState) if f.name in before}
        decision = decide(ScaleState(**known), self._window(ctx), float(ctx.current_time or 0.0), self._bounds(asked))
        told = {"num_shards": decision.num_shards, "reason": decision.reason, "rebalance": decision.rebalance}
        if decision.rebalance or decision.num_shards != before.get("wanted", ctx.target_num_replicas):
            _log.info("%s: %s", ctx.deployment_name, decision.reason)
            if self._link is not None:
                self._link.decided(told)
        return decision.num_shards, {**asdict(decision.state), **told, "asked": asked}

    def _asked(self, before: Mapping[str, Any]) -> dict[str, int] | None:
        """The operator's last wish: what the link knows, or what Serve kept if the Conductor has forgotten it."""
        kept: dict[str, int] | None = before.get("asked")
        wish = self._link.wish() if self._link is not None else None
        return asdict(wish) if wish is not None and wish.number > (kept or {}).get("number", 0) else kept

    def _bounds(self, asked: Mapping[str, int] | None) -> ScalePolicy:
        if not asked:
            return self._policy
        least = asked["min_shards"] or self._policy.min_shards
        most = max(asked["max_shards"] or self._policy.max_shards, least)
        return replace(self._policy, min_shards=least, max_shards=most)

    def _window(self, ctx: Any) -> LoadWindow:
        metrics: Mapping[str, Mapping[Any, float]] = ctx.aggregated_metrics or {}
        gains, fits = metrics.get("predicted_gain", {}), metrics.get("fits", {})
        return LoadWindow(
            busy={str(replica): float(value) for replica, value in metrics.get(self._metric, {}).items()},
            num_running=int(ctx.current_num_replicas),
            fits=int(max(fits.values(), default=1)),
            predicted_gain=max(gains.values()) if gains else None,
        )
