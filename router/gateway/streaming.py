"""One generation in work: outputs of the engine in, events with gapless offsets out, the turn committed at the end.

    run: tier.generate -> conversation.push -> writer -> session.commit -> Finished;  finish: the last event

Several tokens that came while the client was slow are one event, so a slow reader costs less, not more. A stream that
goes on elsewhere (`resume.py`) first writes the events of what is recorded again: they follow from outputs alone."""

import logging
from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ... import telemetry as names
from ...errors import SessionStoreUnavailable
from ...proto import expertmesh_pb2 as pb
from ...request import FinishReason, RequestOutput
from ...telemetry import Telemetry
from .committed_turn import turn_record
from .contracts import OutputStream, Sessions, Tier, Writer
from .conversation import Conversation, Delta, Section
from .forced_call import CallFinder, ForcedCallStream
from .pending import PendingCommit, PendingCommits
from .plan import GenerationPlan
from .tokenizer import Tokenizer

_COMMITTED = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.TOOL_CALLS)
_log = logging.getLogger(__name__)

Record = Callable[[RequestOutput], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What all generations of a gateway work with."""

    model: str  # name told to clients
    tokenizer: Tokenizer
    tier: Tier
    sessions: Sessions | None
    pending: PendingCommits | None
    telemetry: Telemetry
    clock: Callable[[], float]
    wall_clock: Callable[[], float]


class Generation:
    """One request in work: `run` once."""

    def __init__(self, shared: Shared, plan: GenerationPlan, *, received_at: float) -> None:
        self.plan, self.request, self.owner = plan, plan.request, plan.owner
        self._shared, self._session = shared, plan.session
        self._conversation = Conversation(
            shared.tokenizer,
            state=plan.state,
            stop=plan.stop,
            stop_ids=plan.request.sampling.stop_token_ids,
            strip_answer=plan.strip_answer,
            tools=plan.tools,
        )
        self._include_all = plan.include_token_ids or plan.request.sampling.num_logprobs >= 0  # also without text
        self._received_at = received_at
        self._stream: OutputStream | None = None
        self._reply: dict[Section, list[str]] = {Section.REASONING: [], Section.ANSWER: []}  # for the session record
        self._output_ids = array("i")  # likewise
        self._offset = 0  # of the last event
        self._num_cached_tokens = 0
        self._queue_s = 0.0
        self._first_token_s: float | None = None  # after the request came
        self._first_answer_s: float | None = None
        self._cancelled = False

    @property
    def request_id(self) -> str:
        return self.request.request_id

    def cancel(self) -> None:
        """End it now; the stream finishes with CANCELLED."""
        self._cancelled = True
        if self._stream is not None:
            self._stream.abort()

    async def run(
        self, writer: Writer, *, recorded: Sequence[RequestOutput] = (), record: Record | None = None
    ) -> pb.Finished:
        """Submit, then write the events in order, but the last: `finish`. Cancelling this coroutine aborts the work.

        `recorded`: outputs that the engine gave before; their events are written again and the engine goes on after
        them. `record` is awaited with each new output before its events are written; events then follow from tokens
        alone, not from how many came together, so that those of tokens that nobody could record are the same again."""
        replica_id = self._session.affinity if self._session is not None else ""
        reason, apart = FinishReason.NONE, record is not None
        stream = None if recorded else self._submit(replica_id, [])  # a refusal comes before any event
        try:
            await writer.started(0, self._started())
            for output in recorded:
                reason = await self._take(writer, output, apart=apart)
            if stream is None and not reason:
                stream = self._submit(replica_id, [i for output in recorded for i in output.token_ids])
            if stream is not None:
                async for output in stream:
                    if record is not None:
                        await record(output)
                    reason = await self._take(writer, output, apart=apart)
                    if reason:
                        break
                replica_id = stream.replica_id
        finally:
            if stream is not None:
                stream.abort()
        if not reason:
            reason = FinishReason.CANCELLED
            await self._write_all(writer, self._conversation.finish())
        return await self._finished(reason, replica_id)

    async def replay(self, writer: Writer, recorded: Sequence[RequestOutput], finished: pb.Finished) -> None:
        """Write the events of a stream that has ended, `finished` included."""
        await writer.started(0, self._started())
        reason = FinishReason.NONE
        for output in recorded:
            reason = await self._take(writer, output, apart=True)
        if not reason:
            await self._write_all(writer, self._conversation.finish())
        await self.finish(writer, finished)

    async def finish(self, writer: Writer, finished: pb.Finished) -> None:
        await writer.finished(self._offset + 1, finished)

    async def _take(self, writer: Writer, output: RequestOutput, *, apart: bool) -> FinishReason:
        """One output's events, those of each token `apart` or not; NONE = the text goes on."""
        conversation, ids = self._conversation, output.token_ids
        if apart and len(ids) > 1:
            deltas = []
            for i in range(len(ids)):
                deltas += conversation.push(ids[i : i + 1], output.logprobs[i : i + 1])
        else:
            deltas = conversation.push(ids, output.logprobs)
        if self._first_token_s is None or self._session is not None:
            self._note(output)
        ended = conversation.stopped or output.finish_reason
        if ended:
            deltas += conversation.finish()
        await self._write_all(writer, deltas)
        return self._reason(output.finish_reason) if ended else FinishReason.NONE

    async def _write_all(self, writer: Writer, deltas: list[Delta]) -> None:
        for delta in deltas:
            if delta.text or self._include_all or delta.section is Section.TOOL_CALL:
                await self._write(writer, delta)

    def _submit(self, affinity: str, output_ids: list[int]) -> OutputStream:
        tier, plan = self._shared.tier, self.plan
        request = replace(plan.request, output_ids=tuple(output_ids)) if output_ids else plan.request
        submit = partial(tier.generate, affinity=affinity, owner=plan.owner)
        stream: OutputStream
        if plan.forced_call:
            finder = CallFinder(plan.state, self._shared.tokenizer, request.sampling.stop_token_ids)
            stream = ForcedCallStream(submit, request, plan.forced_call, finder)
        else:
            stream = submit(request)
        self._stream = stream
        if self._cancelled:
            stream.abort()
        return stream

    def _reason(self, engine: FinishReason) -> FinishReason:
        """Why the text ended, which only the gateway knows for stop strings and tool calls."""
        conversation = self._conversation
        if conversation.stopped:
            return FinishReason.STOP
        if engine is FinishReason.STOP and any(not call.malformed for call in conversation.tool_calls):
            return FinishReason.TOOL_CALLS
        return engine

    def _started(self) -> pb.Started:
        return pb.Started(
            request_id=self.request_id,
            session_id=self._session.session_id if self._session is not None else "",
            model=self._shared.model,
            prompt_tokens=len(self.request.prompt_ids),
            seed=self.request.sampling.seed,
        )

    def _note(self, output: RequestOutput) -> None:
        """Times and counts that are measured at the first output, and what a session keeps of every one."""
        if self._first_token_s is None and output.token_ids:
            self._first_token_s = self._shared.clock() - self._received_at
            self._queue_s = output.queue_s
            self._num_cached_tokens = output.num_cached_tokens
        if self._session is not None:
            self._output_ids.extend(output.token_ids)

    def _write(self, writer: Writer, delta: Delta) -> Awaitable[None]:
        self._offset += 1
        if self._first_answer_s is None and delta.section is Section.ANSWER and delta.text:
            self._first_answer_s = self._shared.clock() - self._received_at
        if self._session is not None and delta.section is not Section.TOOL_CALL:
            self._reply[delta.section].append(delta.text)
        return writer.delta(self._offset, delta, with_ids=self.plan.include_token_ids)

    async def _finished(self, reason: FinishReason, replica_id: str) -> pb.Finished:
        usage = pb.Usage(
            prompt_tokens=len(self.request.prompt_ids),
            cached_tokens=self._num_cached_tokens,
            completion_tokens=self._conversation.completion_tokens,
            reasoning_tokens=self._conversation.reasoning_tokens,
        )
        committed, version = await self._commit(reason, usage, replica_id)
        timings = pb.Timings(
            queue_s=self._queue_s,
            time_to_first_token_s=self._first_token_s or 0.0,
            time_to_first_answer_token_s=self._first_answer_s or 0.0,
            total_s=self._shared.clock() - self._received_at,
        )
        self._record(reason, usage, timings)
        return pb.Finished(
            reason=int(reason),  # type: ignore[arg-type]
            usage=usage,
            committed=committed,
            session_version=version,
            timings=timings,
            stop_matched=self._conversation.stop_matched,
        )

    async def _commit(self, reason: FinishReason, usage: pb.Usage, replica_id: str) -> tuple[bool, int]:
        """Whether the turn is in the session record, and the record's version. SessionConflict goes to the client."""
        session, sessions = self._session, self._shared.sessions
        if session is None or sessions is None:
            return False, 0
        if reason not in _COMMITTED:
            return False, session.version
        turn = turn_record(
            self.plan,
            output_ids=self._output_ids[: self._conversation.completion_tokens].tolist(),
            reasoning="".join(self._reply[Section.REASONING]),
            answer="".join(self._reply[Section.ANSWER]),
            calls=self._conversation.tool_calls,
            usage=usage,
            reason=reason,
            finished_at=self._shared.wall_clock(),
        )
        try:
            version = await sessions.commit(
                session.session_id, session.version, turn, owner=self.owner, affinity=replica_id
            )
        except SessionStoreUnavailable as error:
            _log.warning("turn %s of session %s is committed later: %s", self.request_id, session.session_id, error)
            assert self._shared.pending is not None
            self._shared.pending.add(PendingCommit(session.session_id, session.version, turn, self.owner, replica_id))
            return False, session.version
        return True, version

    def _record(self, reason: FinishReason, usage: pb.Usage, timings: pb.Timings) -> None:
        telemetry = self._shared.telemetry
        telemetry.record(names.METRIC_REQUESTS, 1, outcome=reason.name)
        if timings.time_to_first_token_s:
            telemetry.record(names.METRIC_TTFT, timings.time_to_first_token_s)
            telemetry.record(names.METRIC_QUEUE, timings.queue_s)
            if usage.completion_tokens > 1:
                mean = (timings.total_s - timings.time_to_first_token_s) / (usage.completion_tokens - 1)
                telemetry.record(names.METRIC_INTER_TOKEN, mean)
        if timings.time_to_first_answer_token_s:
            telemetry.record(names.METRIC_TTFA, timings.time_to_first_answer_token_s)
        for kind in ("prompt", "cached", "completion", "reasoning"):
            telemetry.record(names.METRIC_TOKENS, getattr(usage, f"{kind}_tokens"), kind=kind)
