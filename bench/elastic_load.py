"""The load of `elastic.py`, what is seen of the cluster beside it, and the figures that both give.

Streams are closed loops: each asks again when its answer has ended. Their first answers differ in length, so that they
do not end, begin and grow their contexts in step with one another. Times are seconds since the load began."""

import asyncio
import contextlib
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..client import AnswerDelta, AsyncClient, ReasoningDelta
from ..cluster.app import Cluster
from ..errors import ExpertMeshError, Unavailable
from ..router.status import ClusterState

Phases = Sequence[tuple[int, float]]  # (streams at a time, seconds)
NUM_PROMPTS, NUM_TOKENS = 16, 200
NUM_LENGTHS = 8  # of first answers
QUIET_S = 3.0  # so far from a change of the epoch or the load a wait has nothing to do with it
WARM_S, REPORT_S = 2.0, 1.0  # after a change of the load; until the shards' reports show it


@dataclass(slots=True)
class Watch:
    """What was seen of the cluster while the load ran."""

    shards: list[tuple[float, float]] = field(default_factory=list)  # serving in the epoch
    busy: list[tuple[float, float]] = field(default_factory=list)  # mean of the serving shards
    epochs: list[tuple[float, int]] = field(default_factory=list)
    starts: dict[str, dict[str, float]] = field(default_factory=dict)  # shard -> phase -> when
    decisions: list[tuple[float, str]] = field(default_factory=list)


async def watch(cluster: Cluster, began_at: float, seen: Watch) -> None:
    """Polls the Conductor five times a second."""
    wall_at = time.time() - (time.monotonic() - began_at)
    while True:
        with contextlib.suppress(Unavailable):
            note(await asyncio.to_thread(cluster.state), time.monotonic() - began_at, wall_at, seen)
        await asyncio.sleep(0.2)


def note(state: ClusterState, now: float, wall_at: float, seen: Watch) -> None:
    shards = [p for p in state.processes if p.role == "expert"]
    serving = [p for p in shards if p.name in state.ranks]
    seen.shards.append((now, float(len(serving))))
    seen.busy.append((now, statistics.fmean([p.busy_fraction for p in serving] or [0.0])))
    if not seen.epochs or seen.epochs[-1][1] != state.epoch:
        seen.epochs.append((now, state.epoch))
    for p in shards:
        phases = seen.starts.setdefault(p.name, {"process": now})
        if p.state != "loading":
            phases.setdefault("joined", now)
        if p.name in state.ranks:
            phases.setdefault("serving", now)
    seen.decisions = [(d.at - wall_at, d.text) for d in state.decisions]


@dataclass(slots=True)
class Load:
    """Closed-loop streams, and when each of their tokens came."""

    client: AsyncClient
    phases: Phases
    began_at: float
    wanted: int = 0
    running: int = 0
    num_done: int = 0
    failures: list[str] = field(default_factory=list)
    texts: dict[int, list[int]] = field(default_factory=dict)  # prompt -> its tokens, greedy: always the same
    answers: list[tuple[int, list[float]]] = field(default_factory=list)  # (prompt, when each token came)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for streams, seconds in self.phases:
                self.wanted = streams
                for _ in range(streams - self.running):
                    self.running += 1
                    group.create_task(self._stream(self.running))
                say(f"[{time.monotonic() - self.began_at:5.1f} s] {streams} streams")
                await asyncio.sleep(seconds)
            self.wanted = 0

    async def _stream(self, number: int) -> None:
        num_tokens = NUM_TOKENS * (1 + number % NUM_LENGTHS) // NUM_LENGTHS
        while number <= self.wanted:
            await self._one(number % NUM_PROMPTS, num_tokens)
            num_tokens = NUM_TOKENS
        self.running -= 1

    async def _one(self, prompt: int, num_tokens: int) -> None:
        came: list[float] = []
        ids: list[int] = []
        self.answers.append((prompt, came))
        try:
            stream = self.client.generate(
                token_ids=[100 + prompt, 7, 8],
                temperature=0.0,
                max_tokens=num_tokens,
                ignore_eos=True,
                include_token_ids=True,
                timeout_s=120.0,
            )
            async for event in stream:
                if isinstance(event, AnswerDelta | ReasoningDelta):
                    ids += event.token_ids
                    came += [time.monotonic() - self.began_at] * len(event.token_ids)
        except ExpertMeshError as error:
            self.failures.append(f"prompt {prompt}: {type(error).__name__}: {error}")
            return
        self.num_done += 1
        self._compare(prompt, ids, num_tokens)

    def _compare(self, prompt: int, ids: list[int], num_tokens: int) -> None:
        known = self.texts.setdefault(prompt, ids)
        common = min(len(known), len(ids))
        if len(ids) != num_tokens or ids[:common] != known[:common]:
            self.failures.append(f"prompt {prompt}: other tokens")
        elif len(ids) > len(known):
            self.texts[prompt] = ids


async def measure(cluster: Cluster, phases: Phases, fewest: int) -> tuple[Load, Watch]:
    """The whole load; afterwards a tier that grew has time to become `fewest` again."""
    seen, began_at = Watch(), time.monotonic()
    async with AsyncClient(cluster.gateways) as client:
        load = Load(client, phases, began_at)
        watching = asyncio.create_task(watch(cluster, began_at, seen))
        await load.run()
        deadline = time.monotonic() + 45.0
        while seen.shards[-1][1] != fewest and time.monotonic() < deadline:  # noqa: ASYNC110  # the watcher's own pace
            await asyncio.sleep(0.2)
        watching.cancel()
    return load, seen


# ---------------------------------------------------------------- figures


def per_second(load: Load) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(tokens in each second, p99 inter-token time of each second in ms)."""
    counts: dict[int, int] = {}
    gaps: dict[int, list[float]] = {}
    for _, came in load.answers:
        for at in came:
            counts[int(at)] = counts.get(int(at), 0) + 1
        for a, b in itertools.pairwise(came):
            gaps.setdefault(int(b), []).append(b - a)
    seconds = range(max(counts, default=0) + 1)
    p99 = [(s + 0.5, 1e3 * sorted(gaps[s])[int(0.99 * (len(gaps[s]) - 1))]) for s in seconds if s in gaps]
    return [(s + 0.5, float(counts.get(s, 0))) for s in seconds], p99


def phase_of(phases: Phases, streams: int) -> tuple[float, float]:
    """When the first phase of so many streams has settled, and when it ends."""
    begins = [0.0, *itertools.accumulate(seconds for _, seconds in phases)]
    index = [n for n, _ in phases].index(streams)
    return begins[index] + WARM_S, begins[index + 1] - WARM_S / 2


def throughput(load: Load, seen: Watch, shards: int) -> float:
    """Tokens a second with so many shards serving, under the most streams; 0 where there was no such time."""
    spans = _spans(load.phases, seen, shards, max(n for n, _ in load.phases))
    seconds = sum(b - a for a, b in spans)
    count = sum(any(a <= at < b for a, b in spans) for _, came in load.answers for at in came)
    return count / seconds if seconds else 0.0


def seconds_with(phases: Phases, seen: Watch, shards: int) -> float:
    """How long `throughput` looked."""
    return sum(b - a for a, b in _spans(phases, seen, shards, max(n for n, _ in phases)))


def mean_busy(phases: Phases, seen: Watch, shards: int, streams: int) -> float:
    """Busy fraction of the tier with so many shards and streams, over reports of that time; 0 where there was none."""
    spans = _spans(phases, seen, shards, streams)
    found = [
        busy
        for at, busy in seen.busy
        if any(a <= at < b for a, b in spans) and not any(0 <= at - epoch < REPORT_S for epoch, _ in seen.epochs)
    ]
    return statistics.fmean(found) if found else 0.0


def _spans(phases: Phases, seen: Watch, shards: int, streams: int) -> list[tuple[float, float]]:
    first, last = phase_of(phases, streams)
    return [(a, b) for (a, n), (b, _) in itertools.pairwise(seen.shards) if n == shards and first < a and b < last]


@dataclass(frozen=True, slots=True)
class Wait:
    """Of a stream for its next event."""

    at: float  # when it ended
    seconds: float
    num_held: int  # tokens of the event whose text cannot go alone (part of a character, none at all): steps, no stall

    def steps(self, step_s: float) -> float:
        return self.seconds / step_s - self.num_held


def waits(load: Load) -> list[Wait]:
    """What text holds back is seen from the answers: no event of any answer to the prompt ends with that token. An
    event of several tokens that came late together is no such thing."""
    ends: dict[int, set[int]] = {}
    for prompt, came in load.answers:
        ends.setdefault(prompt, set()).update(i for i, (a, b) in enumerate(itertools.pairwise(came)) if a < b)
    found = []
    for prompt, came in load.answers:
        last = [i for i, (a, b) in enumerate(itertools.pairwise(came)) if a < b]
        for before, end in itertools.pairwise([*last, len(came) - 1] if came else []):
            num_held = sum(i not in ends[prompt] for i in range(before + 1, end))
            found.append(Wait(came[end], came[end] - came[before], num_held))
    return sorted(found, key=lambda wait: wait.at)


def switches(load: Load, seen: Watch) -> list[dict[str, float]]:
    """For each change of the epoch: the longest wait of any stream around it, in steps of that time, and by how much
    that is longer than streams wait without a change (`undisturbed`): on a host of few cores that is no little."""
    usual, every = undisturbed(load, seen)["p99.9"], waits(load)
    found = [longest_wait(every, at) for at, _ in seen.epochs[1:]]
    return [wait | {"excess_steps": round(max(0.0, wait["steps"] - usual), 2)} for wait in found if wait is not None]


def undisturbed(load: Load, seen: Watch) -> dict[str, float]:
    """What streams wait for a token in steps of that second, where no epoch changed and the load did not."""
    changes = [at for at, _ in seen.epochs[1:]]
    changes += itertools.accumulate(seconds for _, seconds in load.phases)
    by_second: dict[int, list[Wait]] = {}
    for wait in waits(load):
        if wait.at > QUIET_S and all(abs(wait.at - change) > QUIET_S for change in changes):
            by_second.setdefault(int(wait.at), []).append(wait)
    steps = sorted(wait.steps(step_of(second)) for second in by_second.values() for wait in second)
    if not steps:
        return {"p50": 0.0, "p99.9": 0.0, "most": 0.0}
    return {
        "p50": round(steps[len(steps) // 2], 2),
        "p99.9": round(steps[int(0.999 * (len(steps) - 1))], 2),
        "most": round(steps[-1], 2),
    }


def longest_wait(every: Sequence[Wait], at: float) -> dict[str, float] | None:
    near = [wait for wait in every if at - 1.0 < wait.at < at + 0.5]
    if not near:
        return None
    step_s = step_of([wait for wait in every if at - 2.0 < wait.at < at + 2.0])
    longest = max(near, key=lambda wait: wait.steps(step_s))
    return {"at_s": round(at, 1), "longest_s": round(longest.seconds, 4), "steps": round(longest.steps(step_s), 2)}


def step_of(some: Sequence[Wait]) -> float:
    """Seconds of a step at that time."""
    return statistics.median([wait.seconds for wait in some if not wait.num_held] or [wait.seconds for wait in some])


def starts(seen: Watch) -> list[dict[str, Any]]:
    """Of each shard that was added: seconds from the decision to its process, joining and serving."""
    found: list[dict[str, Any]] = []
    for name, phases in seen.starts.items():
        asked = [
            at for at, text in seen.decisions if at <= phases["process"] and "target" in text and "enough" not in text
        ]
        if asked and "serving" in phases and phases["process"] > 1.0:
            found.append({"shard": name} | {k: round(at - asked[-1], 2) for k, at in phases.items()})
    return found


def say(line: str) -> None:
    print(line, flush=True)
