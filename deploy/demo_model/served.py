"""A running cluster as a `Generate` for `evaluate.py`: many streams at once over gRPC, greedy, whole chats.

The same requests that `offline.py` answers with transformers go through gateway, attention replica and expert shards;
the chat template is applied by the gateway, budgets are enforced by the engine. A tool call may come as typed deltas or
as text of the answer: both become the text that the model wrote."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ...client import AnswerDelta, AsyncClient, Finished, ReasoningDelta, Started, ToolCallDelta
from ...config import CacheConfig, ClusterConfig, NetworkConfig
from .evaluate import MAX_NEW_TOKENS, Reply, Request
from .tasks import Json

CHECKPOINT = Path(__file__).parent / "checkpoint"
T = TypeVar("T")
TIMEOUT_S = 300.0  # of one reply, the wait for its turn in the engine included


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One reply with what a comparison by token needs."""

    reply: Reply
    token_ids: tuple[int, ...]  # all generated ones, the stop id and a budget's closing sentence included
    num_prompt_tokens: int
    margins: tuple[float, ...] = ()  # of a reference only: the best logit's lead over the second, at each token


class Served:
    """Ask the gateways, `concurrency` streams at a time. Greedy, so that any run says the same.

    May be called from several threads: one event loop of its own carries all streams."""

    def __init__(self, addresses: Sequence[str], *, concurrency: int = 32) -> None:
        self.num_requests = self.num_tokens = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="served", daemon=True)
        self._thread.start()
        self._client = self._wait(_connect(addresses))
        self._turn = asyncio.Semaphore(concurrency)

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        return [answer.reply for answer in self.answers(requests)]

    def answers(self, requests: Sequence[Request], *, with_ids: bool = False) -> list[Answer]:
        return self._wait(self._ask_all(requests, with_ids))

    def close(self) -> None:
        self._wait(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _ask_all(self, requests: Sequence[Request], with_ids: bool) -> list[Answer]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._ask_in_turn(request, with_ids)) for request in requests]
        return [task.result() for task in tasks]

    async def _ask_in_turn(self, request: Request, with_ids: bool) -> Answer:
        async with self._turn:
            answer = await ask(self._client, request, with_ids=with_ids)
        self.num_requests += 1
        self.num_tokens += answer.reply.num_tokens
        return answer


async def _connect(addresses: Sequence[str]) -> AsyncClient:
    return AsyncClient(addresses)


async def ask(client: AsyncClient, request: Request, *, with_ids: bool = False) -> Answer:
    """Stream one reply to its end."""
    stream = client.generate(
        [_message(message) for message in request.messages],
        tools=request.tools,
        thinking="on" if request.enable_thinking else "off",
        thinking_budget=request.budget,
        include_token_ids=with_ids,
        temperature=0.0,
        max_tokens=MAX_NEW_TOKENS,
        timeout_s=TIMEOUT_S,
    )
    reasoning, text = "", _Text()
    ids: list[int] = []
    num_prompt_tokens = num_tokens = 0
    async for event in stream:
        match event:
            case Started():
                num_prompt_tokens = event.prompt_tokens
            case ReasoningDelta():
                reasoning += event.text
            case AnswerDelta() | ToolCallDelta():
                text.add(event)
            case Finished():
                num_tokens = event.completion_tokens
        ids += getattr(event, "token_ids", ())
    reply = Reply(reasoning=reasoning.strip("\n"), text=text.whole(), num_tokens=num_tokens)
    return Answer(reply=reply, token_ids=tuple(ids), num_prompt_tokens=num_prompt_tokens)


def demo_config(num_shards: int, *, num_attention: int = 1) -> ClusterConfig:
    """A local cluster that serves the demo model, in float32 on a CPU."""
    return ClusterConfig(
        model=str(CHECKPOINT),
        served_model_name="demo-moe",
        num_attention_replicas=num_attention,
        num_expert_shards=num_shards,
        network=NetworkConfig(gateway_port=0),
        cache=CacheConfig(kv_memory_bytes=256 << 20),
    )


class _Text:
    """The answer as the model wrote it: text, and typed calls put back between their tags."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._calls: dict[int, tuple[int, ToolCallDelta]] = {}  # index -> place among the parts, the call so far

    def add(self, event: AnswerDelta | ToolCallDelta) -> None:
        if isinstance(event, AnswerDelta):
            self._parts.append(event.text)
            return
        if event.index not in self._calls:
            self._parts.append("")
            self._calls[event.index] = (len(self._parts) - 1, event)
            return
        place, call = self._calls[event.index]
        joined = ToolCallDelta(
            call.offset,
            call.index,
            call.name or event.name,
            call.arguments_text + event.arguments_text,
            call.malformed or event.malformed,
        )
        self._calls[event.index] = (place, joined)

    def whole(self) -> str:
        for place, call in self._calls.values():
            body = call.arguments_text
            if not call.malformed:
                body = f'{{"name": "{call.name}", "arguments": {body}}}'
            self._parts[place] = f"\n<tool_call>\n{body}\n</tool_call>\n"
        return "".join(self._parts).strip("\n")


def _message(message: Json) -> dict[str, Any]:
    """The client takes calls bare; the template's form has them inside {"type": "function", "function": ...}."""
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    return {**message, "tool_calls": calls}
