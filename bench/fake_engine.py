"""An engine that computes nothing: it says a given reply, a token a request and step, over the real link.

For measuring and testing everything in front of the engine. It keeps the engine's contract: thread of its own, one
`publish` a step, replay from `output_ids`, abort within a step, typed rejection when full."""

import threading
import time
from collections.abc import Callable, Sequence

from ..errors import ExpertMeshError, QueueFull
from ..request import EngineLoad, EngineRequest, FinishReason, RequestOutput, TokenLogprob

Reply = Callable[[EngineRequest], Sequence[int]]
Publish = Callable[[list[RequestOutput]], None]


class FakeEngine:
    """`reply(request)` is the whole output, cut at max_tokens. Steps take `step_s`, 0 = as fast as it can."""

    def __init__(self, publish: Publish, reply: Reply, *, max_num_seqs: int = 4096, step_s: float = 0.0) -> None:
        self.aborted: list[str] = []
        self.submitted: list[EngineRequest] = []
        self.refuse: ExpertMeshError | None = None  # raised for every submit from now on
        self._publish, self._reply, self._max_num_seqs, self.step_s = publish, reply, max_num_seqs, step_s
        self._running: dict[str, tuple[EngineRequest, Sequence[int], int]] = {}  # request, reply, tokens said
        self._credits = -1  # steps allowed; -1 = no limit
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="fake engine", daemon=True)
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        with self._changed:
            if self.refuse is not None:
                raise self.refuse
            if len(self._running) >= self._max_num_seqs:
                raise QueueFull(f"{len(self._running)} requests of {self._max_num_seqs}; try again", retry_after_s=0.5)
            self.submitted.append(request)
            reply = list(self._reply(request))[: request.sampling.max_tokens]
            self._running[request.request_id] = (request, reply, len(request.output_ids))
            self._changed.notify_all()

    def abort(self, request_id: str) -> None:
        with self._changed:
            if self._running.pop(request_id, None) is not None:
                self.aborted.append(request_id)
                self._changed.notify_all()

    def load(self) -> EngineLoad:
        return EngineLoad(num_running=len(self._running), num_waiting=0, num_free_kv_blocks=1, num_kv_blocks=1)

    def allow(self, num_steps: int) -> None:
        """From now on step only so often (more with each call); -1 lifts the limit."""
        with self._changed:
            self._credits = -1 if num_steps < 0 else max(self._credits, 0) + num_steps
            self._changed.notify_all()

    @property
    def num_credits(self) -> int:
        """Steps that are still allowed; -1 = no limit."""
        return self._credits

    def wait_idle(self, timeout_s: float = 10.0) -> bool:
        """True once nothing runs."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, timeout_s)

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or (self._running and self._credits))
                if self._stopped:
                    return
                self._credits -= self._credits > 0
                outputs = [self._advance(*running) for running in list(self._running.values())]
                self._changed.notify_all()
            self._publish(outputs)
            if self.step_s:
                due = max(due + self.step_s, time.monotonic() - self.step_s)  # late by a step at most, no burst after
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped, max(0.0, due - time.monotonic()))

    def _advance(self, request: EngineRequest, reply: Sequence[int], said: int) -> RequestOutput:
        first = said == len(request.output_ids)
        output = RequestOutput(request.request_id, list(reply[said : said + 1]))
        output.num_cached_tokens, output.queue_s = (1, 0.001) if first else (0, 0.0)
        if request.sampling.num_logprobs >= 0:
            output.logprobs = [TokenLogprob(i, -0.25, ((i, -0.25),)) for i in output.token_ids]
        if said + 1 >= len(reply):
            stopped = bool(reply) and reply[-1] in request.sampling.stop_token_ids
            output.finish_reason = FinishReason.STOP if stopped else FinishReason.LENGTH
            del self._running[request.request_id]
        else:
            self._running[request.request_id] = (request, reply, said + 1)
        return output
