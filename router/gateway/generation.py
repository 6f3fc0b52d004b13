"""One generation at the gateway, whatever the transport: request in, events out.

    prepare: validate -> session.open -> chat template -> encode -> sampling and thinking -> EngineRequest
    run:     tier.generate -> conversation -> events with gapless offsets -> session.commit -> finished

The gRPC server writes the events as messages; any other front door writes the same ones in its form. Several tokens
that came while the client was slow are one event, so a slow reader costs less, not more."""

import asyncio
import hashlib
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ... import telemetry as names
from ...errors import ExpertMeshError, InvalidRequest, SessionStoreUnavailable
from ...proto import expertmesh_pb2 as pb
from ...request import EngineRequest, FinishReason, RequestOutput, SamplingParams, ThinkingBudget
from ...telemetry import Telemetry
from . import validation
from .api_keys import prefix_salt
from .chat import ChatTemplate, Family
from .conversation import Conversation, Delta, Section, State, prompt_state
from .forced_call import CallFinder, ForcedCallStream, call_beginning
from .pending import PendingCommit, PendingCommits
from .session import SessionRecord, TurnRecord
from .tokenizer import Tokenizer

CLOSING_TEXT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    "</think>\n\n"
)  # Qwen3's documentation; ends the think block when its budget is spent
ENCODE_INLINE_CHARS = 16_384  # longer prompts are encoded in a thread
_COMMITTED = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.TOOL_CALLS)
_log = logging.getLogger(__name__)


class OutputStream(Protocol):
    """Outputs of one request; aborting ends the iteration and the work."""

    @property
    def replica_id(self) -> str: ...

    def __aiter__(self) -> AsyncIterator[RequestOutput]: ...

    async def __anext__(self) -> RequestOutput: ...

    def abort(self) -> None: ...


class Tier(Protocol):
    def generate(self, request: EngineRequest, *, affinity: str = "") -> OutputStream: ...


class Writer(Protocol):
    """Where the events of one stream go, in the form of the transport (`events.py` for gRPC)."""

    def started(self, offset: int, started: pb.Started) -> Awaitable[None]: ...

    def delta(self, offset: int, delta: Delta, *, with_ids: bool) -> Awaitable[None]: ...

    def finished(self, offset: int, finished: pb.Finished) -> Awaitable[None]: ...


class Sessions(Protocol):
    """What a generation needs of the session store (`session.py`)."""

    async def open(self, session_id: str, owner: str = "") -> SessionRecord: ...

    async def commit(
        self, session_id: str, expected_version: int, turn: TurnRecord, *, owner: str = "", affinity: str = ""
    ) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """What the gateway knows about the served model."""

    model: str  # name told to clients
    max_model_len: int  # tokens of prompt and output together
    vocab_size: int  # rows of the embedding; ids that the tokenizer does not know are refused whatever this is
    closing_text: str = CLOSING_TEXT


class Generations:
    """Makes generations. Holds what they share; nothing of any request."""

    def __init__(
        self,
        config: GenerationConfig,
        *,
        tokenizer: Tokenizer,
        tier: Tier,
        sessions: Sessions | None,
        telemetry: Telemetry | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        new_seed: Callable[[], int] = lambda: secrets.randbits(63),
    ) -> None:
        self.config, self.tokenizer, self.tier, self.sessions = config, tokenizer, tier, sessions
        self.telemetry = telemetry or Telemetry.off()
        self.clock, self.wall_clock, self._new_seed = clock, wall_clock, new_seed
        self.template = ChatTemplate.of(tokenizer)
        self.vocab_size = min(config.vocab_size, tokenizer.vocab_size)
        self.pending = None if sessions is None else PendingCommits(sessions)
        self._turn_end_ids = self._find_turn_end()
        self._closing_ids = tuple(tokenizer.encode(config.closing_text))

    async def prepare(
        self, request: pb.GenerateRequest, *, owner: str = "", remaining_s: float | None = None, traceparent: str = ""
    ) -> "Generation | CommittedTurn":
        """Check the request and make everything the engine needs; no work has started when this returns."""
        received_at = self.clock()
        validation.check_input(request)
        stop = validation.stop_strings(request.sampling)
        session: SessionRecord | None = None
        messages: list[dict[str, Any]] = []
        if request.HasField("chat"):
            messages = validation.chat_messages(request.chat)
            if request.session_id:
                session = await self._open(request.session_id, owner)
        tools = validation.tool_definitions(request.tools, request.tool_choice)
        thinking, settings = request.thinking, dict[str, Any]()
        if session is not None:
            for index, turn in enumerate(session.turns):
                if request.request_id and turn.request_id == request.request_id:
                    return CommittedTurn(self, session, index, messages, owner)
            thinking, settings = turn_settings(request, session, tools)
        spliced = self._splice(session, settings)
        prompt_ids = await self._prompt_ids(request, messages, session, tools, thinking, spliced)
        state = prompt_state(prompt_ids, self.tokenizer.special_ids)
        engine_request = EngineRequest(
            request_id=request.request_id or secrets.token_hex(12),
            prompt_ids=tuple(prompt_ids),
            sampling=self._sampling(request, len(prompt_ids)),
            thinking=self._budget(thinking, state),
            deadline=0.0 if remaining_s is None or request.resumable else self.wall_clock() + remaining_s,
            prefix_salt=prefix_salt(owner),
            traceparent=traceparent,
        )
        plan = GenerationPlan(
            request=engine_request,
            state=state,
            stop=stop,
            strip_answer=request.HasField("chat"),
            tools=bool(tools),
            forced_call=self._forced_call(request.tool_choice),
            include_token_ids=request.include_token_ids,
            owner=owner,
            messages=messages,
            session=session,
            settings=settings,
            num_spliced=len(spliced),
        )
        return Generation(self, plan, received_at=received_at)

    async def _open(self, session_id: str, owner: str) -> SessionRecord:
        if self.sessions is None:
            raise SessionStoreUnavailable("this gateway has no session store; send the whole chat instead")
        assert self.pending is not None
        self.pending.check(session_id, owner)
        return await self.sessions.open(session_id, owner)

    def _splice(self, session: SessionRecord | None, settings: dict[str, Any]) -> list[int]:
        """With KEEP_THINKING, the ids of the conversation so far as they were: prompt and output of every turn."""
        if session is None or settings.get("history_policy") != pb.HISTORY_POLICY_KEEP_THINKING:
            return []
        ids: list[int] = []
        for turn in session.turns:
            if not turn.input_ids or not turn.num_spliced:
                ids = []  # not kept, or its prompt held all that was before
            if not turn.input_ids:
                continue
            output = list(turn.output_ids)
            while output and output[-1] in self.tokenizer.special_ids.eos:
                output.pop()
            ids += [*turn.input_ids, *output, *self._turn_end_ids]
        return ids

    def _find_turn_end(self) -> tuple[int, ...]:
        """What the template puts behind an assistant's message."""
        if self.template is None:
            return ()
        probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
        text = self.template.render(probe, add_generation_prompt=False).rpartition("ANSWER")[2]
        return tuple(self.tokenizer.encode(text))

    async def _prompt_ids(
        self,
        request: pb.GenerateRequest,
        messages: list[dict[str, Any]],
        session: SessionRecord | None,
        tools: list[dict[str, Any]],
        thinking: pb.ThinkingOptions,
        spliced: list[int],
    ) -> Sequence[int]:
        if request.HasField("token_ids"):
            validation.check_token_ids("token_ids.ids", request.token_ids.ids, self.vocab_size)
            ids: Sequence[int] = request.token_ids.ids
            field = "token_ids"
        else:
            field = "chat" if messages else "prompt"
            text = request.prompt
            if messages:
                history = session.messages if session is not None and not spliced else []
                text = self._render([*history, *messages], [] if spliced else tools, thinking)
            if len(text) <= ENCODE_INLINE_CHARS:
                ids = self.tokenizer.encode(text, add_special_tokens=not messages)
            else:
                ids = await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=not messages)
            if not ids:
                raise InvalidRequest(field, "no tokens", "text that encodes to at least one token")
            if max(ids) >= self.vocab_size:
                raise InvalidRequest(field, max(ids), f"text in the model's vocabulary of {self.vocab_size} ids")
            ids = [*spliced, *ids] if spliced else ids
        if len(ids) >= self.config.max_model_len:
            raise InvalidRequest(
                field,
                f"{len(ids)} tokens",
                f"at most {self.config.max_model_len - 1}, the context of {self.config.max_model_len} less one",
            )
        return ids

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], thinking: pb.ThinkingOptions) -> str:
        if self.template is None:
            raise InvalidRequest("chat", "set", "prompt or token_ids: this model has no chat template")
        enable = self._enable_thinking(thinking, self.template.family)
        return self.template.render(messages, tools=tools, enable_thinking=enable)

    def _enable_thinking(self, options: pb.ThinkingOptions, family: Family) -> bool | None:
        off = options.mode == pb.ThinkingOptions.OFF
        if options.mode == pb.ThinkingOptions.ON and family is Family.INSTRUCT:
            raise InvalidRequest("thinking.mode", "ON", "DEFAULT or OFF: this model never thinks")
        if off and family is Family.THINKING:
            raise InvalidRequest("thinking.mode", "OFF", "DEFAULT or ON: this model always thinks")
        if off or (options.HasField("budget_tokens") and options.budget_tokens == 0):
            return False
        return True if options.mode == pb.ThinkingOptions.ON else None

    def _budget(self, thinking: pb.ThinkingOptions, state: State) -> ThinkingBudget | None:
        if not thinking.HasField("budget_tokens") or state is State.CLOSED:
            return None
        budget, special = thinking.budget_tokens, self.tokenizer.special_ids
        if special.think is None or special.end_think is None:
            raise InvalidRequest("thinking.budget_tokens", budget, "unset: this model's vocabulary has no think tokens")
        return ThinkingBudget(
            budget_tokens=budget,
            think_id=special.think,
            end_think_id=special.end_think,
            closing_ids=self._closing_ids,
            starts_inside=state is State.REASONING,
        )

    def _forced_call(self, choice: pb.ToolChoice) -> tuple[int, ...]:
        if choice.mode not in (pb.ToolChoice.REQUIRED, pb.ToolChoice.NAMED):
            return ()
        if self.tokenizer.special_ids.tool_call is None:
            raise InvalidRequest("tool_choice", "set", "AUTO or NONE: this model's vocabulary has no tool call tokens")
        return call_beginning(self.tokenizer, choice.name)

    def _sampling(self, request: pb.GenerateRequest, num_prompt_tokens: int) -> SamplingParams:
        return validation.sampling_params(
            request.sampling,
            self.tokenizer.defaults,
            eos=self.tokenizer.special_ids.eos,
            vocab_size=self.vocab_size,
            room=self.config.max_model_len - num_prompt_tokens,
            seed=self._new_seed(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPlan:
    """A request, checked and resolved: all that a generation is made of (a stream's journal begins with it)."""

    request: EngineRequest
    state: State  # where the prompt leaves the model
    stop: tuple[str, ...] = ()
    strip_answer: bool = True
    tools: bool = False
    forced_call: tuple[int, ...] = ()  # how the call begins that must come
    include_token_ids: bool = False
    owner: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)  # new in this turn
    session: SessionRecord | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # of the session from this turn on
    num_spliced: int = 0  # prompt ids taken from earlier turns


def turn_settings(
    request: pb.GenerateRequest, session: SessionRecord, tools: list[dict[str, Any]]
) -> tuple[pb.ThinkingOptions, dict[str, Any]]:
    """What is in force for this turn and from it on: the session's settings, and what the request sets anew."""
    settings, thinking = dict(session.settings), request.thinking
    if thinking.mode:
        settings["thinking_mode"] = thinking.mode
        if thinking.mode == pb.ThinkingOptions.ON and settings.get("budget_tokens") == 0:
            del settings["budget_tokens"]
    if thinking.HasField("budget_tokens"):
        settings["budget_tokens"] = thinking.budget_tokens
    if request.history_policy:
        settings["history_policy"] = request.history_policy
    if tools and settings.get("history_policy") == pb.HISTORY_POLICY_KEEP_THINKING:
        digest = hashlib.sha256(json.dumps(tools).encode()).hexdigest()[:16]
        if session.turns and settings.setdefault("tools", digest) != digest:
            raise InvalidRequest(
                "tools", "changed", "the tools that the session began with: KEEP_THINKING splices them"
            )
        settings["tools"] = digest
    mode, budget = settings.get("thinking_mode", 0), settings.get("budget_tokens")
    return pb.ThinkingOptions(mode=mode, budget_tokens=budget), settings


Record = Callable[[RequestOutput], Awaitable[None]]


class Generation:
    """One request in work: `run` once."""

    def __init__(self, shared: Generations, plan: GenerationPlan, *, received_at: float) -> None:
        self.plan, self.request, self.owner = plan, plan.request, plan.owner
        self._shared, self._messages, self._session = shared, plan.messages, plan.session
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
        self._output_ids: list[int] = []  # likewise
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
        them. `record` is awaited with each new output before its events are written."""
        replica_id = self._session.affinity if self._session is not None else ""
        reason = FinishReason.NONE
        stream = None if recorded else self._submit(replica_id, [])  # a refusal comes before any event
        try:
            await writer.started(0, self._started())
            for output in recorded:
                reason = await self._take(writer, output)
            if stream is None and not reason:
                stream = self._submit(replica_id, [i for output in recorded for i in output.token_ids])
            if stream is not None:
                async for output in stream:
                    if record is not None:
                        await record(output)
                    reason = await self._take(writer, output)
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
            reason = await self._take(writer, output)
        if not reason:
            await self._write_all(writer, self._conversation.finish())
        await self.finish(writer, finished)

    async def finish(self, writer: Writer, finished: pb.Finished) -> None:
        await writer.finished(self._offset + 1, finished)

    async def _take(self, writer: Writer, output: RequestOutput) -> FinishReason:
        """One output's events; NONE = the text goes on."""
        conversation = self._conversation
        deltas = conversation.push(output.token_ids, output.logprobs)
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
        stream: OutputStream
        if plan.forced_call:
            finder = CallFinder(plan.state, self._shared.tokenizer)
            stream = ForcedCallStream(lambda r: tier.generate(r, affinity=affinity), request, plan.forced_call, finder)
        else:
            stream = tier.generate(request, affinity=affinity)
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
            model=self._shared.config.model,
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
        turn = TurnRecord(
            messages=[*self._messages, self._reply_message()],
            output_ids=self._output_ids[: self._conversation.completion_tokens],
            usage={field.name: value for field, value in usage.ListFields()},
            request_id=self.request_id,
            finished_at=self._shared.wall_clock(),
            finish_reason=int(reason),
            seed=self.request.sampling.seed,
            settings=self.plan.settings,
        )
        if self.plan.settings.get("history_policy") == pb.HISTORY_POLICY_KEEP_THINKING:
            spliced = self.plan.num_spliced
            turn = replace(turn, input_ids=list(self.request.prompt_ids[spliced:]), num_spliced=spliced)
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

    def _reply_message(self) -> dict[str, Any]:
        """The assistant's message of this turn; a malformed call stays in the content as the model wrote it."""
        calls = self._conversation.tool_calls
        parts = ["".join(self._reply[Section.ANSWER])]
        parts += [f"<tool_call>{c.text}</tool_call>" for c in calls if c.malformed]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "\n".join(p for p in parts if p),
            "reasoning_content": "".join(self._reply[Section.REASONING]),
        }
        good = [{"name": c.name, "arguments": json.loads(c.arguments_text)} for c in calls if not c.malformed]
        return message | {"tool_calls": good} if good else message

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


class CommittedTurn:
    """A turn asked for again that is in the session record already: the same reply, no work."""

    def __init__(
        self, shared: Generations, session: SessionRecord, index: int, messages: list[dict[str, Any]], owner: str
    ) -> None:
        self._shared, self._session, self._index, self.owner = shared, session, index, owner
        self._turn = session.turns[index]
        self.request_id = self._turn.request_id
        if self._turn.messages[:-1] != messages:
            raise InvalidRequest("request_id", self.request_id, "an id that no other turn of the session has")
        self._offset = 0

    def cancel(self) -> None:
        """There is nothing to end."""

    async def run(self, writer: Writer) -> pb.Finished:
        turn, reply = self._turn, self._turn.messages[-1]
        usage = pb.Usage(**turn.usage)
        started = pb.Started(
            request_id=self.request_id,
            session_id=self._session.session_id,
            model=self._shared.config.model,
            prompt_tokens=usage.prompt_tokens,
            seed=turn.seed,
        )
        await writer.started(0, started)
        deltas = [
            Delta(Section.REASONING, reply.get("reasoning_content", "")),
            Delta(Section.ANSWER, reply["content"]),
        ]
        for index, call in enumerate(reply.get("tool_calls", ())):
            text = json.dumps(call["arguments"], ensure_ascii=False)
            deltas.append(Delta(Section.TOOL_CALL, text, index=index, name=call["name"]))
        for delta in deltas:
            if delta.text:
                self._offset += 1
                await writer.delta(self._offset, delta, with_ids=False)
        return pb.Finished(
            reason=turn.finish_reason,  # type: ignore[arg-type]
            usage=usage,
            committed=True,
            session_version=self._index + 1,
        )

    async def finish(self, writer: Writer, finished: pb.Finished) -> None:
        await writer.finished(self._offset + 1, finished)


def record_failure(telemetry: Telemetry, error: ExpertMeshError) -> None:
    telemetry.record(names.METRIC_REQUESTS, 1, outcome=error.code)
