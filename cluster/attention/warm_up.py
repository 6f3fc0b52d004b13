"""An engine's requests to itself before anybody else's: what its first steps cost, no client waits for.

Why requests and not calls of the model: they take the very path that clients' take (scheduler, steps of the mesh,
experts elsewhere, sampling), so all of it is compiled, loaded and allocated, cuBLAS has chosen, and what clients' steps
replay is captured. Four seconds of a first request on a GPU. Prompts are long enough for each plan of the expert
product (`kernels/plan.py`) and are ids that nobody sends; what they say goes nowhere.

Steps with prompts: all buckets; prompts alone fill most, those above a step's prompt tokens need decodes beside. Steps
of decodes: a **company** of requests grows from bucket to bucket. Before others are served (`run`) it is the powers of
two, for a bounded time: a rank alone replays a larger bucket for one that it has not captured. The buckets between, and
all forms, follow (`rest`) while nobody asks for anything. Whoever comes ends a company within a step, and so does
another replica with tokens in the step, which waits for what is captured here: of several that start together the one
that draws the shorter pause goes first."""

import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

from ...config import SchedulerConfig
from ...errors import ExpertMeshError
from ...request import EngineRequest, FinishReason, RequestOutput, SamplingParams
from ...router.leader import PROMPT_BUCKETS
from .engine import OWN_SALT, Engine

_log = logging.getLogger(__name__)

Publish = Callable[[list[RequestOutput]], None]

OUTPUT = 3  # tokens: a bucket runs eagerly, is captured, and is replayed
STEPS = 4  # tokens of the newest of a company: of a prompt's step, an eager one, a captured one and a replay
STEPS_REST = 6  # ... and of two in which other forms are captured
TIMEOUT_S = 60.0  # of one request
BOUND_S = 2.0  # for steps of decodes, before others are served
QUIET_S = 0.5  # between two looks whether somebody asks for something


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
        self._said: dict[str, int] = {}  # their tokens so far
        self._ends: dict[str, RequestOutput] = {}
        self._changed = threading.Condition()
        self._turns = itertools.count()
        self._done: set[int] = set()  # buckets of decodes that `rest` has gone through
        self._stopped = threading.Event()

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
        began, going = time.monotonic(), True
        for beside, group in itertools.groupby(rounds(scheduler, max_model_len), key=lambda one: one.beside):
            company = self._company(engine, max_model_len)
            going = going and self._grow(company, beside, 1)
            going = going and all(self._ask(engine, one.prompt) for one in group)
            self._dismiss(company)
            if not going:
                return time.monotonic() - began
        since = perf_counter()
        self._decode(
            engine,
            _powers_of_two(scheduler),
            STEPS,
            max_model_len,
            lambda: perf_counter() - since >= BOUND_S or _has_others(engine, since),
        )
        for length in lessons(scheduler, max_model_len):
            self._ask(engine, length)
        return time.monotonic() - began

    def rest(self, engine: Engine, scheduler: SchedulerConfig, *, max_model_len: int) -> None:
        """What `run` has left, in idle time; returns when that is done, cannot be done, or `stop` was called."""
        while not self._stopped.is_set():
            left = [size for size in scheduler.graph_buckets if size not in self._done]
            if not left:
                return
            if _has_others(engine, perf_counter() - QUIET_S):
                self._stopped.wait(QUIET_S * random.uniform(1, 2))
                continue
            is_over = partial(_has_others, engine, perf_counter())
            engine.prepare(True)
            try:
                done = self._decode(engine, left, STEPS_REST, max_model_len, is_over)
            finally:
                engine.prepare(False)
            self._done.update(done)
            if not done and not is_over():
                return

    def stop(self) -> None:
        """From any thread: `rest` ends."""
        self._stopped.set()

    # -- steps of decodes

    def _decode(
        self, engine: Engine, sizes: Sequence[int], num_tokens: int, max_model_len: int, is_over: Callable[[], bool]
    ) -> list[int]:
        """The buckets of these that were gone through: until `is_over`, there is no room, or a request ends."""
        company, done = self._company(engine, max_model_len), list[int]()
        for size in sizes:
            began = perf_counter()
            if is_over() or not company.has_room(size) or not self._grow(company, size, num_tokens, is_over):
                break
            if engine.others_seen_s < began:  # else it was another bucket
                done.append(size)
        self._dismiss(company)
        return done

    def _company(self, engine: Engine, max_model_len: int) -> "_Company":
        return _Company(engine, [], f"warm-up-{next(self._turns)}", max_model_len - 2)

    def _grow(
        self, company: "_Company", size: int, num_tokens: int, is_over: Callable[[], bool] = lambda: False
    ) -> bool:
        """Until it is so large and all who are new have said so many tokens, and nobody has ended."""
        new = [f"{company.name}-{i}" for i in range(len(company.names), size)]
        company.names += new
        if not all(self._submit(company.engine, name, 2, company.max_tokens) for name in new):
            return False

        def reached() -> bool:
            return all(self._said.get(name, 0) >= num_tokens for name in new)

        self._wait(lambda: reached() or is_over() or not self._own.issuperset(company.names))
        return reached() and self._own.issuperset(company.names)

    def _dismiss(self, company: "_Company") -> None:
        for name in company.names:
            company.engine.abort(name)
        self._wait(lambda: self._own.isdisjoint(company.names))
        for name in company.names:
            self._said.pop(name, None)
            self._ends.pop(name, None)

    # -- requests

    def _ask(self, engine: Engine, length: int) -> bool:
        name = f"warm-up-{length}"
        self._ends.pop(name, None)
        if not self._submit(engine, name, length, OUTPUT):
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

    def _submit(self, engine: Engine, name: str, length: int, num_tokens: int) -> bool:
        draw = random.Random(next(self._turns))  # no prompt begins as one before it, whose blocks may be cached
        request = EngineRequest(
            request_id=name,
            prompt_ids=tuple(draw.randrange(engine.vocab_size) for _ in range(length)),
            sampling=SamplingParams(max_tokens=num_tokens),
            prefix_salt=OWN_SALT,
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
                self._said[output.request_id] = self._said.get(output.request_id, 0) + len(output.token_ids)
                if output.finish_reason is not FinishReason.NONE:
                    self._own.discard(output.request_id)
                    self._ends[output.request_id] = output
            self._changed.notify_all()

    def _wait(self, until: Callable[[], bool]) -> bool:
        with self._changed:
            return self._changed.wait_for(until, TIMEOUT_S)


@dataclass(slots=True)
class _Company:
    """Requests that decode together."""

    engine: Engine
    names: list[str]
    name: str
    max_tokens: int

    def has_room(self, size: int) -> bool:
        """A block for each who is new, and two for each to grow into."""
        return self.engine.load().num_free_kv_blocks >= 3 * size - len(self.names)


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


def lessons(scheduler: SchedulerConfig, max_model_len: int) -> Sequence[int]:
    """Prompts from whose steps the scheduler learns what a token costs, once it knows steps of decodes."""
    longest = max((one.prompt for one in rounds(scheduler, max_model_len)), default=0)
    return sorted({length for length in (longest // 4, longest // 2, longest) if length > 0})


def _powers_of_two(scheduler: SchedulerConfig) -> list[int]:
    """Buckets of decodes, of which each other is less than half of the next; the largest among them."""
    sizes = scheduler.graph_buckets
    return [size for size in sizes if size & (size - 1) == 0 or size == sizes[-1]]


def _has_others(engine: Engine, since_s: float) -> bool:
    """Somebody else's requests are here, or were in a step of another replica since then."""
    load = engine.load()
    return load.num_running + load.num_waiting > 0 or engine.others_seen_s > since_s
