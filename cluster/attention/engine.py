"""The engine thread of one attention replica: admit, bid, run the named step, publish, free.

One thread owns the scheduler, the KV cache and the device. Everything reaches it as an event on one queue (requests,
aborts, step headers), so nothing is locked and an idle engine is a thread asleep in `get`. It runs no step of its own
accord: it bids, and the header that answers says when and how much, because attention replicas step together.

A step is launched, and collected when it is over; only then are its tokens seen, published and their blocks shared.
Where the runner runs ahead (a GPU) the next step is launched before this one is collected: it reads this one's tokens
on the device, so the host's work hides behind the device's. A step is committed as a whole. After an ExchangeError the
steps in flight are void, and the very same batch is kept and run again in the next header. Blocks of a request that
ends while a step still writes to them may be given away at once: whoever gets them writes before it reads, in a later
step. Idea: vLLM's asynchronous scheduling."""

import contextlib
import heapq
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from time import perf_counter

from ...config import SchedulerConfig
from ...errors import (
    DeadlineExceeded,
    EpochError,
    ExchangeError,
    ExpertMeshError,
    InvalidRequest,
    ReplicaLost,
    Unavailable,
)
from ...request import AnswerGrammar, EngineLoad, EngineRequest, FinishReason, RequestOutput
from ...router.contracts import Mesh, StepContext
from ...router.epoch import StepHeader
from .batch import ScheduledTokens, StepBatch, with_seen_tokens
from .grammar import Compiled, GrammarCompiler, GrammarState
from .kv_cache import KVCache
from .runner import Flight, Landed, StepResult, StepRunner
from .scheduler import Scheduler
from .sequence import Sequence
from .step_stats import StepObserver, StepStats

_log = logging.getLogger(__name__)
_POLL_S = 1e-4  # how often a step in flight is looked after
_NOT_FINITE = "the model's output for this request is not finite; nothing of it was cached"
OWN_SALT = b"warm-up"  # prefix_salt of an engine's requests to itself: nobody's prefix, and nobody's load
_NO_TOKEN = "the model's output for this request is not finite, or its response_format allows no token here"

Publish = Callable[[list[RequestOutput]], None]


class _Stop(Enum):
    STOP = auto()


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Constrained:
    """A request whose grammar is ready, or why it is not."""

    request: EngineRequest
    grammar: Compiled | ExpertMeshError


_Event = EngineRequest | _Constrained | StepHeader | _Abort | _Stop


@dataclass(slots=True)
class _Pending:
    """A batch that has been scheduled and not yet committed."""

    scheduled: list[ScheduledTokens]
    batch: StepBatch

    @property
    def num_tokens(self) -> int:
        return self.batch.num_tokens


@dataclass(slots=True)
class _Launched:
    """A step in flight, with the batch that this rank has in it."""

    step: StepContext
    flight: Flight
    pending: _Pending | None
    started_at: float
    schedule_s: float


class Engine:
    """`submit`, `abort`, `load`, `on_header`, `drain`, `stop` are thread-safe; `publish` is called from the engine
    thread, once a step and when requests end between steps. A stop id that ends a text is among its tokens."""

    def __init__(
        self,
        runner: StepRunner,
        mesh: Mesh,
        *,
        scheduler: SchedulerConfig,
        publish: Publish,
        max_model_len: int,
        attention_parity: int = 0,
        enable_prefix_cache: bool = True,
        clock: Callable[[], float] = time.time,
        observer: StepObserver | None = None,
        grammars: GrammarCompiler | None = None,
        on_failure: Callable[[ExpertMeshError], None] | None = None,
    ) -> None:
        """`on_failure` is called once, from the engine thread, if that thread fails (not when it is stopped): the place
        to leave the mesh, whose other members may be waiting for this one in the middle of a step."""
        self._runner, self._mesh, self._publish, self._clock, self._observer = runner, mesh, publish, clock, observer
        self._on_failure, self._grammars = on_failure, grammars
        cache = KVCache(runner.num_blocks, runner.block_size, enable_prefix_cache=enable_prefix_cache)
        self.scheduler = Scheduler(scheduler, cache, max_model_len=max_model_len, attention_parity=attention_parity)
        # Shared with callers, under the lock.
        self._lock = threading.Lock()
        self._live_ids: set[str] = set()
        self._own_ids: set[str] = set()  # of them, those with OWN_SALT
        self._num_incoming = 0  # submitted, still in the event queue
        self._draining = False
        self._failure: ExpertMeshError | None = None
        self._idle = threading.Condition(self._lock)
        self.others_seen_s = float("-inf")  # by `perf_counter`: the last step with tokens of another replica
        # The engine thread's own.
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._headers: deque[StepHeader] = deque()
        self._outputs: list[RequestOutput] = []
        self._deadlines: list[tuple[float, str]] = []  # heap
        self._pending: _Pending | None = None  # to be launched (again)
        self._launched: deque[_Launched] = deque()
        self._needs_host: set[str] = set()  # live requests that no step may run ahead of
        self._epoch = 0  # of the last header
        self._bid: tuple[int, int] = (0, 0)  # out and not yet answered; (0, 0) = none
        self._num_arrivals = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # ------------------------------------------------------------------ any thread

    def submit(self, request: EngineRequest) -> None:
        """Queue a request, or raise at once: InvalidRequest, QueueFull, KVCacheExhausted, Unavailable."""
        ids = (*request.prompt_ids, *request.output_ids)
        self.scheduler.check(len(ids))
        if min(ids) < 0 or max(ids) >= self._runner.vocab_size:
            raise InvalidRequest("prompt_ids", max(ids), f"ids of 0..{self._runner.vocab_size - 1}")
        with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._draining:
                raise Unavailable("this replica is draining and takes no new requests; try another")
            if request.request_id in self._live_ids:
                raise InvalidRequest("request_id", request.request_id, "an id that is not running already")
            self.scheduler.check_queue(self._num_incoming + self.scheduler.num_waiting)
            self._live_ids.add(request.request_id)
            if request.prefix_salt == OWN_SALT:
                self._own_ids.add(request.request_id)
            self._num_incoming += 1
        if request.grammar is None:
            self._events.put(request)
        else:
            self._compile(request, request.grammar)

    def _compile(self, request: EngineRequest, grammar: AnswerGrammar) -> None:
        """Queue the request when its grammar is compiled: no step waits for that."""
        try:
            if self._grammars is None:
                raise InvalidRequest("response_format", grammar.kind, "unset: this replica takes no grammars")
            self._grammars.compile(grammar, lambda ready: self._events.put(_Constrained(request, ready)))
        except ExpertMeshError:
            with self._lock:
                self._live_ids.discard(request.request_id)
                self._num_incoming -= 1
            raise

    def abort(self, request_id: str) -> None:
        """End a request with CANCELLED; its blocks are free within a step. Unknown ids are ignored."""
        self._events.put(_Abort(request_id))

    def on_header(self, header: StepHeader) -> None:
        """The mesh names a step in which this rank takes part."""
        self._events.put(header)

    def load(self) -> EngineLoad:
        """Without the engine's own requests, which give way at once."""
        cache, num_own, num_running = self.scheduler.cache, len(self._own_ids), self.scheduler.num_running
        return EngineLoad(
            num_running=max(0, num_running - num_own),
            num_waiting=max(0, self.scheduler.num_waiting + self._num_incoming - max(0, num_own - num_running)),
            num_free_kv_blocks=cache.num_free_blocks,
            num_kv_blocks=cache.num_blocks,
            draining=self._draining,
        )

    @property
    def vocab_size(self) -> int:
        """Ids from here on are neither taken nor given."""
        return self._runner.vocab_size

    @property
    def failure(self) -> ExpertMeshError | None:
        """Why this engine serves no more; None = healthy."""
        return self._failure

    def prepare(self, on: bool) -> None:
        """Nobody waits for the steps from here on: what later ones replay may be captured in them."""
        self._runner.prepare(on)

    def drain(self) -> None:
        """Take no new requests; those at hand finish."""
        with self._lock:
            self._draining = True

    def wait_until_idle(self, timeout_s: float) -> bool:
        """True once no request is left."""
        with self._lock:
            return self._idle.wait_for(lambda: not self._live_ids, timeout_s)

    def stop(self, timeout_s: float = 30.0) -> None:
        """End the thread; requests still at hand end with UNAVAILABLE."""
        self._events.put(_Stop.STOP)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        if self._grammars is not None:
            self._grammars.close()

    # ------------------------------------------------------------------ engine thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._receive()
                if self._headers and not self._stopping:
                    self._step(self._headers.popleft())
                elif self._launched and self._launched[0].flight.is_over:
                    self._land()
                self._expire()
                self._flush()
                self._offer()
            self._fail(ReplicaLost("this attention replica was stopped; the request can go on at another"))
        except Exception as error:
            _log.exception("the engine thread failed; this replica serves no more")
            failure = ReplicaLost(f"the engine of this attention replica failed: {type(error).__name__}: {error}")
            self._fail(failure)
            if self._on_failure is not None:
                self._on_failure(failure)

    def _receive(self) -> None:
        """Sleep until something happens, the end of a step in flight included, then take every event that is there."""
        try:
            while self._launched and not self._headers and not self._stopping and not self._launched[0].flight.is_over:
                with contextlib.suppress(queue.Empty):
                    self._take(self._events.get(timeout=_POLL_S))
            if not self._headers and not self._launched:
                self._take(self._events.get(timeout=self._seconds_to_deadline()))
            while True:
                self._take(self._events.get_nowait())
        except queue.Empty:
            return

    def _take(self, event: _Event) -> None:
        match event:
            case StepHeader():
                self._headers.append(event)
            case EngineRequest():
                self._admit(event)
            case _Constrained(request, grammar):
                self._admit_constrained(request, grammar)
            case _Abort(request_id):
                self._end_early(request_id, FinishReason.CANCELLED)
            case _Stop.STOP:
                self._stopping = True

    def _admit_constrained(self, request: EngineRequest, grammar: Compiled | ExpertMeshError) -> None:
        if request.request_id not in self._live_ids or isinstance(grammar, ExpertMeshError):
            with self._lock:
                self._num_incoming -= 1
            if isinstance(grammar, ExpertMeshError) and request.request_id in self._live_ids:
                self._answer(request.request_id, FinishReason.ERROR, grammar)
            return
        self._admit(request, grammar())

    def _admit(self, request: EngineRequest, grammar: GrammarState | None = None) -> None:
        sequence = Sequence.of(request, arrival=self._num_arrivals, arrived_at=self._clock(), grammar=grammar)
        self._num_arrivals += 1
        try:
            self.scheduler.add(sequence)
        except ExpertMeshError as error:
            self._answer(request.request_id, FinishReason.ERROR, error)
            return
        finally:
            with self._lock:
                self._num_incoming -= 1
        if self._runner.needs_host(sequence):
            self._needs_host.add(request.request_id)
        if request.deadline > 0:
            heapq.heappush(self._deadlines, (request.deadline, request.request_id))
        if request.output_ids:  # a replay may already be complete
            reason = sequence.finish_after(request.output_ids[-1], forced=False, max_model_len=self._max_len)
            if reason is not FinishReason.NONE:
                self.scheduler.remove(sequence)
                self._answer(request.request_id, reason)

    def _step(self, header: StepHeader) -> None:
        """Launch what the header says: own tokens if this rank is a source and has some, else the others' service. Then
        collect, of the steps in flight all or all but the newest."""
        started_at, started = self._clock(), perf_counter()
        runs_ahead = self._runner.runs_ahead and not self._needs_host and not self.scheduler.may_preempt
        if not runs_ahead or header.epoch != self._epoch:
            self._land_all()
        elif self._launched and self._launched[0].flight.is_over:
            self._land()  # nothing to hide behind: its tokens need not wait for a launch
        try:
            step = self._mesh.enter(header)
        except (ExchangeError, EpochError) as error:  # a broken epoch, or a header that came after its epoch was over
            _log.warning("step %d was not entered: %s", header.step_id, error)
            self._bid = (0, 0)
            return
        self._epoch = header.epoch
        granted = header.num_tokens[self._mesh.rank]
        if sum(header.num_tokens) > granted:
            self.others_seen_s = started
        pending = self._choose(granted) if granted else None
        launched = _Launched(step, Landed(None), pending, started_at, perf_counter() - started)
        try:
            if pending is None:
                launched.flight = self._runner.serve(step)
            else:
                launched.flight = self._runner.launch(pending.batch, pending.scheduled, step)
        except ExchangeError as error:
            self._land_all()  # an older batch that has to be run again takes this one's place
            self._void(launched, error)
            return
        if pending is not None:
            self.scheduler.advance(pending.scheduled)
            self._pending = None
        self._launched.append(launched)
        if runs_ahead:
            self._offer()  # the leader decides on the next step while this one runs
            while len(self._launched) > 1:
                self._land()
        else:
            self._land_all()

    def _land_all(self) -> None:
        while self._launched:
            self._land()

    def _land(self) -> None:
        """Collect the oldest step in flight and commit it."""
        launched = self._launched.popleft()
        try:
            result = launched.flight.collect()
        except ExchangeError as error:
            newer, self._launched = self._launched, deque()
            for later in reversed(newer):
                with contextlib.suppress(ExchangeError):
                    later.flight.collect()
                if later.pending is not None:
                    self.scheduler.retreat(later.pending.scheduled)
            if launched.pending is not None:
                self._pending = launched.pending
                self.scheduler.retreat(launched.pending.scheduled)
                launched.pending.batch = with_seen_tokens(launched.pending.batch, launched.pending.scheduled)
            self._void(launched, error)
            return
        if launched.pending is not None and result is not None:
            num_others = sum(launched.step.header.num_tokens) - launched.pending.num_tokens
            self.scheduler.observe(launched.pending.scheduled, num_others=max(0, num_others), seconds=result.step_s)
            self._commit(launched.pending, result)
        self._offer()  # before publishing: the leader decides on the next step meanwhile
        self._observe(launched, result)

    def _void(self, launched: _Launched, error: ExchangeError) -> None:
        """The step changed nothing; its batch is run again, unless nobody waits for it any more."""
        _log.warning("step %d will be run again: %s", launched.step.header.step_id, error)
        self._bid = (0, 0)
        self._drop_if_unwanted()
        self._offer()
        self._observe(launched, None, error)

    def _observe(self, launched: _Launched, result: StepResult | None, error: ExchangeError | None = None) -> None:
        computed = perf_counter()
        self._flush()
        if self._observer is not None:
            self._observer.observe(
                StepStats.of(
                    launched.step,
                    launched.pending.scheduled if launched.pending is not None else [],
                    result,
                    self.load(),
                    started_at=launched.started_at,
                    schedule_s=launched.schedule_s,
                    publish_s=perf_counter() - computed,
                    num_preemptions=self.scheduler.num_preemptions,
                    error=error,
                )
            )

    def _choose(self, granted: int) -> _Pending | None:
        """The batch to run with so many tokens: the one that failed before, or a new one; None = nothing to do."""
        num_decode, self._bid = self._bid[0], (0, 0)
        if self._pending is None:
            scheduled = self.scheduler.schedule(granted, granted - min(granted, num_decode))
            if scheduled:
                now = self._clock()
                for item in scheduled:
                    if item.sequence.admitted_at < 0:
                        item.sequence.admitted_at = now
                self._pending = _Pending(scheduled, self._runner.build(scheduled))
        if self._pending is not None and self._pending.num_tokens > granted:
            return None  # a replay needs room for all of its batch
        return self._pending

    def _commit(self, pending: _Pending, result: StepResult) -> None:
        """The step succeeded: its tokens count, the drawn ones are accepted, finished sequences are freed."""
        sampled = result.sampled
        samplers = [item.sequence for item in pending.scheduled if item.samples]
        for row, sequence in enumerate(samplers):
            if sequence.finish_reason is FinishReason.NONE and not sampled.finite[row]:
                error = ExpertMeshError(_NOT_FINITE if sequence.grammar is None else _NO_TOKEN)
                self._finish(sequence, FinishReason.ERROR, error)
        self.scheduler.settle(pending.scheduled)
        for row, sequence in enumerate(samplers):
            if sequence.finish_reason is not FinishReason.NONE:
                continue
            token_id = sampled.token_ids[row]
            sequence.see(token_id)
            output = RequestOutput(sequence.request_id, [token_id])
            if not sequence.published:
                sequence.published = True
                output.num_cached_tokens = sequence.num_cached_tokens
                output.queue_s = sequence.admitted_at - sequence.arrived_at
            logprob = sampled.logprobs[row]
            if logprob is not None:
                output.logprobs.append(logprob)
            output.finish_reason = sequence.finish_after(
                token_id, forced=sampled.forced[row], max_model_len=self._max_len
            )
            self._outputs.append(output)
            if output.finish_reason is not FinishReason.NONE:
                self._remove(sequence, output.finish_reason)

    def _end_early(self, request_id: str, reason: FinishReason, error: ExpertMeshError | None = None) -> None:
        sequence = self.scheduler.get(request_id)
        if sequence is None:
            if request_id in self._live_ids:  # its grammar is being compiled
                self._answer(request_id, reason, error)
        elif sequence.finish_reason is FinishReason.NONE:
            self._finish(sequence, reason, error)

    def _finish(self, sequence: Sequence, reason: FinishReason, error: ExpertMeshError | None = None) -> None:
        """End a sequence outside the normal way."""
        self._answer(sequence.request_id, reason, error)
        self._remove(sequence, reason)
        self._drop_if_unwanted()

    def _remove(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        self.scheduler.remove(sequence)
        self._runner.release(sequence)
        self._forget(sequence.request_id)

    def _drop_if_unwanted(self) -> None:
        """A kept batch that nobody waits for is not run again."""
        pending = self._pending
        if pending is not None and all(i.sequence.finish_reason is not FinishReason.NONE for i in pending.scheduled):
            self._pending = None

    def _answer(self, request_id: str, reason: FinishReason, error: ExpertMeshError | None = None) -> None:
        output = RequestOutput(request_id, [], finish_reason=reason)
        if error is not None:
            output.error_code, output.error_message = error.code, error.message
        self._outputs.append(output)
        self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        self._needs_host.discard(request_id)
        with self._lock:
            self._live_ids.discard(request_id)
            self._own_ids.discard(request_id)

    def _expire(self) -> None:
        """End requests whose deadline has passed."""
        while self._deadlines:
            deadline, request_id = self._deadlines[0]
            late = self._clock() - deadline
            if late < 0 and request_id in self._live_ids:
                return
            heapq.heappop(self._deadlines)
            if late >= 0:
                sequence = self.scheduler.get(request_id)
                if sequence is not None and sequence.request.deadline == deadline:
                    message = f"the deadline passed after {sequence.num_output_tokens} tokens"
                    self._end_early(request_id, FinishReason.ERROR, DeadlineExceeded(message))

    def _seconds_to_deadline(self) -> float | None:
        return max(0.0, self._deadlines[0][0] - self._clock()) if self._deadlines else None

    def _flush(self) -> None:
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            try:
                self._publish(outputs)
            finally:
                with self._lock:
                    if not self._live_ids:
                        self._idle.notify_all()

    def _offer(self) -> None:
        """Keep one bid out while there is work; a kept batch is asked for whole. Withdraw it when the work is gone."""
        if self._headers or self._stopping:
            return
        wanted = (self._pending.num_tokens, 0) if self._pending is not None else self.scheduler.bid()
        has_work, is_out = wanted != (0, 0), self._bid != (0, 0)
        if has_work != is_out:
            self._bid = wanted
            traceparent = next((s.request.traceparent for s in self.scheduler.sequences() if s.request.traceparent), "")
            self._mesh.bid(*wanted, traceparent)

    def _fail(self, error: ReplicaLost) -> None:
        """Refuse everything from now on and end every request, so that no stream hangs."""
        with self._lock:
            self._failure = error
            live = sorted(self._live_ids)
        for request_id in live:
            self._answer(request_id, FinishReason.ERROR, error)
        try:
            self._flush()
        except Exception:
            _log.exception("%d requests could not be told that the engine ended", len(live))

    @property
    def _max_len(self) -> int:
        return self.scheduler.max_model_len
