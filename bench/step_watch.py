"""What each step of an engine held and where its time went, for the question of which steps are long, and why.

A step's milliseconds are those between its tokens and the step's before, as a stream sees them: whatever holds the
engine thread up is in them. Beside it stand the host's time for launching, the device's from the first kernel to the
last, and what may hold either up: a graph that was captured in the step, memory that the allocators had to ask the
driver for, the GPU's and pinned, and Python's search for garbage."""

import gc
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from ..cluster.attention.batch import ScheduledTokens, StepBatch
from ..cluster.attention.runner import Flight, StepRunner
from ..cluster.attention.step_stats import StepStats
from ..router.contracts import StepContext


@dataclass(slots=True)
class Watched:
    """One step. `ms` is known once its tokens are out."""

    step_id: int
    at_s: float  # when it was launched, by the watch's clock
    num_decodes: int
    chunks: tuple[tuple[int, int], ...]  # of each prompt: tokens, and the context at their end
    bucket: int  # of the header
    how: str = ""  # "graphs", "captured", "eager"
    host_ms: float = 0.0
    device_ms: float = 0.0  # 0 on a CPU
    ms: float = 0.0
    told_s: float = 0.0  # when its tokens were out
    num_mallocs: int = 0  # of the driver's memory, while it was launched
    num_pinned: int = 0  # pieces of pinned memory, likewise ...
    pinned_ms: float = 0.0  # ... and what the driver took for them
    gc_ms: float = 0.0  # between the step's before and its tokens, in any thread
    _events: Any = field(default=None, repr=False)

    def __str__(self) -> str:
        prompts = " + ".join(f"{tokens} to {end}" for tokens, end in self.chunks[:3])
        more = f" + {len(self.chunks) - 3} prompts" if len(self.chunks) > 3 else ""
        held = f"{self.num_decodes} decodes, prompts {prompts or '-'}{more}, bucket {self.bucket}, {self.how}"
        times = f"{self.ms:.1f} ms (host {self.host_ms:.1f}, device {self.device_ms:.1f})"
        spoilt = f", {self.num_mallocs} allocations" if self.num_mallocs else ""
        spoilt += f", {self.num_pinned} pinned in {self.pinned_ms:.1f} ms" if self.num_pinned else ""
        return times + f": {held}{spoilt}" + (f", garbage {self.gc_ms:.1f} ms" if self.gc_ms else "")


class StepWatch:
    """An engine's observer that has its runner's launches told. `watch` before the engine starts."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self.steps: list[Watched] = []  # in the order in which their tokens came out
        self._flying: dict[int, Watched] = {}
        self._last_s = 0.0
        self._gc_began_s = self._gc_s = 0.0
        self._device: torch.device | None = None

    def watch(self, runner: StepRunner) -> None:
        launch, anything = runner.launch, runner  # what is counted differs by runner
        device = torch.device(getattr(runner, "device", "cpu"))
        self._device = device if device.type == "cuda" else None

        def watched(batch: StepBatch, scheduled: Seq[ScheduledTokens], step: StepContext) -> Flight:
            one = self._flying[step.header.step_id] = _begun(scheduled, step, self._clock())
            counts, mallocs, pinned, began = _counts(anything), self._num_mallocs(), self._pinned(), self._event()
            flight = launch(batch, scheduled, step)
            one.host_ms = 1e3 * (self._clock() - one.at_s)
            one.how = _how(counts, _counts(anything))
            one.num_mallocs = self._num_mallocs() - mallocs
            one.num_pinned, one.pinned_ms = (after - before for after, before in zip(self._pinned(), pinned))
            one._events = began and (began, self._event())
            return flight

        runner.launch = watched  # type: ignore[method-assign]
        gc.callbacks.append(self._collected)

    def observe(self, stats: StepStats) -> None:
        one, now = self._flying.pop(stats.header.step_id, None), self._clock()
        if one is not None and stats.error is None:
            one.ms = 1e3 * (now - self._last_s) if self._last_s else 0.0
            one.told_s = now
            one.gc_ms, self._gc_s = 1e3 * self._gc_s, 0.0
            self.steps.append(one)
        self._last_s = now

    def longest(self, count: int, began_s: float, ended_s: float) -> list[Watched]:
        """Of those launched in this time, and told of in it, longest first; the device has done them all."""
        found = [s for s in self.steps if began_s <= s.at_s and s.told_s <= ended_s]
        found = sorted(found, key=lambda s: -s.ms)[:count]
        for one in found:
            if one._events is not None:
                one._events[1].synchronize()
                one.device_ms, one._events = one._events[0].elapsed_time(one._events[1]), None
        return found

    def close(self) -> None:
        gc.callbacks.remove(self._collected)

    def _collected(self, phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            self._gc_began_s = self._clock()
        else:
            self._gc_s += self._clock() - self._gc_began_s

    def _num_mallocs(self) -> int:
        if self._device is None:
            return 0
        found = torch.cuda.memory_stats_as_nested_dict(self._device)
        return int(found["num_device_alloc"]) + int(found["num_alloc_retries"])

    def _pinned(self) -> tuple[int, float]:
        """Pieces that were made so far, and milliseconds."""
        if self._device is None:
            return 0, 0.0
        found = torch.cuda.host_memory_stats()
        return int(found.get("num_host_alloc", 0)), 1e-3 * float(found.get("host_alloc_time.total", 0))

    def _event(self) -> Any:
        if self._device is None:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _begun(scheduled: Seq[ScheduledTokens], step: StepContext, at_s: float) -> Watched:
    chunks = tuple((item.num_tokens, item.end) for item in scheduled if item.num_tokens > 1)
    return Watched(
        step_id=step.header.step_id,
        at_s=at_s,
        num_decodes=len(scheduled) - len(chunks),
        chunks=chunks,
        bucket=step.header.bucket,
    )


def _counts(runner: Any) -> tuple[int, int, int]:
    """Captures, replays and eager steps so far."""
    prompts = getattr(runner, "prompt_graphs", None)
    both = [runner, prompts] if prompts is not None else [runner]
    captures, replays = (sum(getattr(one, name, 0) for one in both) for name in ("num_captures", "num_replays"))
    return captures, replays, getattr(runner, "num_eager", 0)


def _how(before: tuple[int, int, int], after: tuple[int, int, int]) -> str:
    if after[0] > before[0]:
        return "captured"
    return "graphs" if after[1] > before[1] else "eager"
