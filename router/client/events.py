"""The events of a stream as a program sees them, and how they are read from the protocol's."""

from dataclasses import dataclass

from ...proto import expertmesh_pb2 as pb
from ...request import FinishReason


@dataclass(frozen=True, slots=True)
class Started:
    offset: int
    request_id: str
    session_id: str
    model: str
    prompt_tokens: int
    seed: int  # in force, also when assigned


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    offset: int
    text: str
    token_ids: tuple[int, ...] = ()  # with include_token_ids


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    offset: int
    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    offset: int
    index: int  # of the call in this reply
    name: str  # in a call's first delta
    arguments_text: str  # a piece of the JSON text
    malformed: bool  # the call's text is none; in its last delta
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    offset: int
    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    committed: bool  # the turn is in the session's record
    session_version: int
    queue_s: float
    time_to_first_token_s: float
    time_to_first_answer_token_s: float
    total_s: float
    stop_matched: str


Event = Started | ReasoningDelta | AnswerDelta | ToolCallDelta | Finished


def decode_event(message: pb.GenerateEvent) -> Event:
    kind = message.WhichOneof("event")
    if kind == "answer":
        return AnswerDelta(message.offset, message.answer.text, tuple(message.answer.token_ids))
    if kind == "reasoning":
        return ReasoningDelta(message.offset, message.reasoning.text, tuple(message.reasoning.token_ids))
    if kind == "started":
        s = message.started
        return Started(message.offset, s.request_id, s.session_id, s.model, s.prompt_tokens, s.seed)
    if kind == "tool_call":
        t = message.tool_call
        return ToolCallDelta(message.offset, t.index, t.name, t.arguments_text, t.malformed, tuple(t.token_ids))
    return _decode_finished(message.offset, message.finished)


def _decode_finished(offset: int, finished: pb.Finished) -> Finished:
    usage, timings = finished.usage, finished.timings
    return Finished(
        offset=offset,
        reason=FinishReason(finished.reason),
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        committed=finished.committed,
        session_version=finished.session_version,
        queue_s=timings.queue_s,
        time_to_first_token_s=timings.time_to_first_token_s,
        time_to_first_answer_token_s=timings.time_to_first_answer_token_s,
        total_s=timings.total_s,
        stop_matched=finished.stop_matched,
    )
