"""An engine's requests to itself before anybody else's: what its first steps cost, no client waits for.

Why requests and not calls of the model: they take the very path that clients' take (scheduler, steps of the mesh,
experts elsewhere, sampling), so all of it is compiled, loaded and allocated, cuBLAS has chosen, and the smallest bucket
of decodes and all of prompts are captured. Four seconds of a first request on a GPU. Prompts are long enough for each
plan of the expert product (`kernels/plan.py`) and are ids that nobody sends; what they say goes nowhere."""

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence

from ...config import SchedulerConfig
from ...errors import ExpertMeshError
from ...request import EngineRequest, FinishReason, RequestOutput, SamplingParams
from ...router.leader import PROMPT_BUCKETS
from .engine import Engine

_log = logging.getLogger(__name__)

Publish = Callable[[list[RequestOutput]], None]

PROMPTS = (*PROMPT_BUCKETS, 1024, 2048)  # tokens; those that fit the replica's steps
OUTPUT = 3  # tokens: a bucket runs eagerly, is captured, and is replayed
TIMEOUT_S = 60.0  # of one request


class WarmUp:
    """Give `publish` to the engine in place of `pass_on`, then `run` once, from any thread but the engine's."""

    def __init__(self, pass_on: Publish) -> None:
        self._pass_on = pass_on
        self._running = ""  # the own request that runs
        self._end: RequestOutput | None = None
        self._ended = threading.Condition()

    def publish(self, outputs: list[RequestOutput]) -> None:
        """From the engine thread: own outputs stay here."""
        if self._running:
            own = [output for output in outputs if output.request_id == self._running]
            outputs = [output for output in outputs if output.request_id != self._running]
            if any(output.finish_reason is not FinishReason.NONE for output in own):
                with self._ended:
                    self._end = own[-1]
                    self._ended.notify_all()
        if outputs:
            self._pass_on(outputs)

    def run(self, engine: Engine, scheduler: SchedulerConfig, *, max_model_len: int) -> float:
        """Seconds that it took. A request that fails is logged: clients' requests will say what is wrong."""
        began = time.monotonic()
        for turn, length in enumerate(lengths(scheduler, max_model_len)):
            if not self._ask(engine, length, turn):
                break
        return time.monotonic() - began

    def _ask(self, engine: Engine, length: int, turn: int) -> bool:
        draw = random.Random(turn)  # no prompt begins as one before it, whose blocks may be cached
        request = EngineRequest(
            request_id=f"warm-up-{length}",
            prompt_ids=tuple(draw.randrange(engine.vocab_size) for _ in range(length)),
            sampling=SamplingParams(max_tokens=OUTPUT),
            prefix_salt=b"warm-up",  # nobody's prefix
        )
        with self._ended:
            self._end, self._running = None, request.request_id
            try:
                engine.submit(request)
            except ExpertMeshError as error:
                _log.warning("no warm-up with a prompt of %d tokens: %s", length, error)
                self._running = ""
                return False
            self._ended.wait_for(lambda: self._end is not None, TIMEOUT_S)
            end, self._running = self._end, ""
        if end is None:
            engine.abort(request.request_id)
        if end is None or end.finish_reason is FinishReason.ERROR:
            why = f"no end after {TIMEOUT_S:.0f} s" if end is None else end.error_message
            _log.warning("the warm-up with a prompt of %d tokens failed: %s", length, why)
            return False
        return True


def lengths(scheduler: SchedulerConfig, max_model_len: int) -> Sequence[int]:
    """Of the prompts, ascending: each fits one step, and the longest is as long as one may be. Those of a bucket come
    twice: it runs eagerly, and is captured."""
    most = min(scheduler.max_num_batched_tokens, scheduler.max_prefill_tokens_per_step, max_model_len - OUTPUT)
    chosen = sorted({min(length, most) for length in PROMPTS}) if most > 0 else []
    return [length for length in chosen for _ in range(2 if length <= PROMPT_BUCKETS[-1] else 1)]
