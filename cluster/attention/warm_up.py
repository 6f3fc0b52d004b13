"""An engine's requests to itself before anybody else's: what its first steps cost, no client waits for.

Why requests and not calls of the model: they take the very path that clients' take (scheduler, steps of the mesh,
experts elsewhere, sampling), so all of it is compiled, loaded and allocated, cuBLAS has chosen, and the smallest bucket
of decodes and all of steps with prompts are captured: prompts alone fill most, those above a step's prompt tokens need
decodes beside. Four seconds of a first request on a GPU. Prompts are long enough for each plan of the expert product
(`kernels/plan.py`) and are ids that nobody sends; what they say goes nowhere."""

import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ...config import SchedulerConfig
from ...errors import ExpertMeshError
from ...request import EngineRequest, FinishReason, RequestOutput, SamplingParams
from ...router.leader import PROMPT_BUCKETS
from .engine import Engine

_log = logging.getLogger(__name__)

Publish = Callable[[list[RequestOutput]], None]

OUTPUT = 3  # tokens: a bucket runs eagerly, is captured, and is replayed
TIMEOUT_S = 60.0  # of one request


@dataclass(frozen=True, slots=True)
class Round:
    """One prompt, while so many requests decode beside it."""

    prompt: int
    beside: int = 0


class WarmUp:
    """Give `publish` to the engine in place of `pass_on`, then `run` once, from any thread but the engine's."""

    def __init__(self, pass_on: Publish) -> None:
        self._pass_on = pass_on
        self._own: set[str] = set()  # requests of ours that have not ended
        self._begun: set[str] = set()  # those that have said something
        self._ends: dict[str, RequestOutput] = {}
        self._changed = threading.Condition()

    def publish(self, outputs: list[RequestOutput]) -> None:
        """From the engine thread: own outputs stay here."""
        if self._own:
            own = [output for output in outputs if output.request_id in self._own]
            outputs = [output for output in outputs if output.request_id not in self._own]
            self._take(own)
        if outputs:
            self._pass_on(outputs)

    def run(self, engine: Engine, scheduler: SchedulerConfig, *, max_model_len: int) -> float:
        """Seconds that it took. A request that fails is logged: clients' requests will say what is wrong."""
        began = time.monotonic()
        turns = itertools.count()
        for beside, group in itertools.groupby(rounds(scheduler, max_model_len), key=lambda one: one.beside):
            company = [f"warm-up-beside-{beside}-{i}" for i in range(beside)]
            going = all(self._submit(engine, name, next(turns), 2, max_model_len - 2) for name in company)
            going = going and self._wait(partial(self._begun.issuperset, company))
            going = going and all(self._ask(engine, one.prompt, next(turns)) for one in group)
            for name in company:
                engine.abort(name)
            self._wait(partial(self._own.isdisjoint, company))
            if not going:
                break
        return time.monotonic() - began

    def _ask(self, engine: Engine, length: int, turn: int) -> bool:
        name = f"warm-up-{length}"
        self._ends.pop(name, None)
        if not self._submit(engine, name, turn, length, OUTPUT):
            return False
        self._wait(lambda: name in self._ends)
        end = self._ends.get(name)
        if end is None:
            engine.abort(name)
        if end is None or end.finish_reason is FinishReason.ERROR:
            why = f"no end after {TIMEOUT_S:.0f} s" if end is None else end.error_message
            _log.warning("the warm-up with a prompt of %d tokens failed: %s", length, why)
            return False
        return True

    def _submit(self, engine: Engine, name: str, turn: int, length: int, num_tokens: int) -> bool:
        draw = random.Random(turn)  # no prompt begins as one before it, whose blocks may be cached
        request = EngineRequest(
            request_id=name,
            prompt_ids=tuple(draw.randrange(engine.vocab_size) for _ in range(length)),
            sampling=SamplingParams(max_tokens=num_tokens),
            prefix_salt=b"warm-up",  # nobody's prefix
        )
        self._own.add(name)
        try:
            engine.submit(request)
        except ExpertMeshError as error:
            _log.warning("no warm-up with a prompt of %d tokens: %s", length, error)
            self._own.discard(name)
            return False
        return True

    def _take(self, own: list[RequestOutput]) -> None:
        with self._changed:
            for output in own:
                self._begun.add(output.request_id)
                if output.finish_reason is not FinishReason.NONE:
                    self._own.discard(output.request_id)
                    self._ends[output.request_id] = output
            self._changed.notify_all()

    def _wait(self, until: Callable[[], bool]) -> bool:
        with self._changed:
            return self._changed.wait_for(until, TIMEOUT_S)


def rounds(scheduler: SchedulerConfig, max_model_len: int) -> Sequence[Round]:
    """Prompts ascending, each in one step, the longest as long as one may be; then that one beside as few decodes as
    fill the next bucket, and the next. Those of a bucket come twice: it runs eagerly, and is captured."""
    a_step = min(scheduler.max_num_batched_tokens, scheduler.max_prefill_tokens_per_step)
    most = min(a_step, max_model_len - OUTPUT)
    if most < 1:
        return []
    found = [Round(length) for length in sorted({min(length, most) for length in PROMPT_BUCKETS}) for _ in range(2)]
    for below, bucket in itertools.pairwise(PROMPT_BUCKETS):
        beside = max(1, below + 1 - most)
        fits = most + beside <= scheduler.max_num_batched_tokens and beside <= scheduler.max_num_waiting
        if most == a_step and most < bucket and beside < scheduler.max_num_seqs and fits:
            found += [Round(most, beside)] * 2
    return found
