"""A turn as the session record keeps it, and the same turn told again to a client that asks once more. Pure."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...errors import InvalidRequest
from ...proto import expertmesh_pb2 as pb
from ...request import FinishReason
from .contracts import Writer
from .conversation import Delta, Section
from .plan import GenerationPlan
from .session import SessionRecord, TurnRecord
from .tool_calls import ToolCall


def turn_record(
    plan: GenerationPlan,
    *,
    output_ids: list[int],
    reasoning: str,
    answer: str,
    calls: Sequence[ToolCall],
    usage: pb.Usage,
    reason: FinishReason,
    finished_at: float,
) -> TurnRecord:
    """`finished_at` in unix seconds; `output_ids` are those that count."""
    turn = TurnRecord(
        messages=[*plan.messages, _reply_message(reasoning, answer, calls)],
        output_ids=output_ids,
        usage={field.name: value for field, value in usage.ListFields()},
        request_id=plan.request.request_id,
        began_at=plan.began_at,
        finished_at=finished_at,
        finish_reason=int(reason),
        seed=plan.request.sampling.seed,
        settings=plan.settings,
    )
    if plan.settings.get("history_policy") != pb.HISTORY_POLICY_KEEP_THINKING:
        return turn
    return replace(turn, input_ids=list(plan.request.prompt_ids[plan.num_spliced :]), num_spliced=plan.num_spliced)


def _reply_message(reasoning: str, answer: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    """The assistant's message; a malformed call stays in the content as the model wrote it."""
    parts = [answer, *(f"<tool_call>{c.text}</tool_call>" for c in calls if c.malformed)]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "\n".join(p for p in parts if p),
        "reasoning_content": reasoning,
    }
    good = [{"name": c.name, "arguments": json.loads(c.arguments_text)} for c in calls if not c.malformed]
    return message | {"tool_calls": good} if good else message


class CommittedTurn:
    """A turn asked for again that is in the session record already: the same reply, no work."""

    def __init__(
        self, model: str, session: SessionRecord, index: int, messages: list[dict[str, Any]], owner: str
    ) -> None:
        self._model, self._session, self._index, self.owner = model, session, index, owner
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
            model=self._model,
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
