"""The contract with a model that thinks and calls tools: real engine, real link, real gateway, on loopback."""

import asyncio
import json

from demo_world import TOKENIZER, demo_world

from expertmesh.client import AnswerDelta, ReasoningDelta, ToolCallDelta
from expertmesh.request import FinishReason
from expertmesh.router.gateway.generation import GenerationConfig

CALCULATOR = {
    "name": "calculator",
    "description": "Evaluate an arithmetic expression.",
    "parameters": {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "The expression"}},
        "required": ["expression"],
    },
}


async def read(stream) -> tuple[list[int], str, str, list[ToolCallDelta]]:
    ids, thought, answer, calls = [], "", "", []
    async for event in stream:
        if isinstance(event, ReasoningDelta | AnswerDelta | ToolCallDelta):
            ids += event.token_ids
        if isinstance(event, ReasoningDelta):
            thought += event.text
        elif isinstance(event, AnswerDelta):
            answer += event.text
        elif isinstance(event, ToolCallDelta):
            calls.append(event)
    return ids, thought, answer, calls


async def test_a_budget_is_exact_from_0_to_64():
    question = "What is 4821 + 377?"
    closing = TOKENIZER.encode(GenerationConfig(model="", max_model_len=1, vocab_size=1).closing_text)
    async with demo_world() as world:

        async def ask(budget: int | None):
            options = {} if budget is None else {"thinking_budget": budget}
            stream = world.client.generate(question, include_token_ids=True, max_tokens=200, **options)
            return await read(stream), stream.finished

        (free, thought, answer, _), _ = await ask(None)
        assert answer == "4821 + 377 = 5198."
        natural = free.index(TOKENIZER.special_ids.end_think) + 1
        assert natural > 64
        for budget, ((ids, text, _, _), end) in enumerate(await asyncio.gather(*(ask(n) for n in range(65)))):
            assert end.completion_tokens == len(ids)
            if not budget:
                assert (text, end.reasoning_tokens) == ("", 0)
                continue
            assert ids[: budget + len(closing)] == [*free[:budget], *closing]
            assert end.reasoning_tokens == budget + len(closing) - 1  # what follows the tag is answer
            assert thought.startswith(text.partition("Considering")[0].rstrip("\n"))
        for budget in (natural - 1, natural, natural + 1):
            (ids, _, _, _), _ = await ask(budget)
            assert (ids == free) is (budget >= natural)


async def test_a_tool_loop():
    async with demo_world() as world:
        messages = [{"role": "user", "content": "Use the calculator to compute 4821 + 377."}]
        stream = world.client.generate(messages, tools=[CALCULATOR])
        _, thought, answer, calls = await read(stream)
        assert stream.finished.reason is FinishReason.TOOL_CALLS
        assert "".join(c.name for c in calls) == "calculator"
        assert not any(c.malformed for c in calls)
        arguments = json.loads("".join(c.arguments_text for c in calls))
        assert arguments == {"expression": "4821 + 377"}
        call = {"name": "calculator", "arguments": arguments}
        messages += [
            {"role": "assistant", "content": answer, "reasoning_content": thought, "tool_calls": [call]},
            {"role": "tool", "content": "5198"},
        ]
        stream = world.client.generate(messages, tools=[CALCULATOR])
        assert "5198" in await stream.answer()
        assert stream.finished.reason is FinishReason.STOP


async def test_a_named_call_is_made_whether_the_model_thinks_or_not():
    async with demo_world() as world:
        for thinking in ("off", None):
            stream = world.client.generate(
                "Use the calculator to compute 31 + 8.",
                tools=[CALCULATOR],
                tool_choice="calculator",
                thinking=thinking,
                max_tokens=200,
            )
            _, _, answer, calls = await read(stream)
            assert stream.finished.reason is FinishReason.TOOL_CALLS
            assert answer == ""
            assert json.loads("".join(c.arguments_text for c in calls)) == {"expression": "31 + 8"}
