"""The contract with a model that thinks and calls tools: real engine, real link, real gateway, on loopback."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import torch

from expertmesh.checkpoint import Checkpoint
from expertmesh.client import AnswerDelta, AsyncClient, ReasoningDelta, ToolCallDelta
from expertmesh.cluster.attention.engine import Engine
from expertmesh.cluster.attention.runner import Runner
from expertmesh.config import CacheConfig, SchedulerConfig
from expertmesh.experts.mlp import LocalExpertMLP
from expertmesh.request import FinishReason
from expertmesh.router.exchange import RowShape
from expertmesh.router.gateway.generation import GenerationConfig
from expertmesh.router.gateway.link import LinkServer
from expertmesh.router.gateway.server import GatewayServer
from expertmesh.router.gateway.tier import AttentionTier
from expertmesh.router.gateway.tokenizer import Tokenizer
from expertmesh.router.mesh import LocalMesh
from expertmesh.router.placement import uniform

CHECKPOINT = Path(__file__).resolve().parents[1] / "deploy" / "demo_model" / "checkpoint"
TOKENIZER = Tokenizer.for_checkpoint(CHECKPOINT)
MAX_MODEL_LEN = 1024
TOKEN = "t"
CALCULATOR = {
    "name": "calculator",
    "description": "Evaluate an arithmetic expression.",
    "parameters": {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "The expression"}},
        "required": ["expression"],
    },
}


@contextlib.asynccontextmanager
async def demo() -> AsyncIterator[AsyncClient]:
    """A gateway in front of the demo model in this process; ends with every KV block free."""
    torch.set_num_threads(1)
    checkpoint = Checkpoint(CHECKPOINT)
    model = checkpoint.config
    runner = Runner.load(checkpoint, CacheConfig(num_blocks=1024))
    placement = uniform(model.num_layers, model.num_experts, 1, moe_layers=model.moe_layer_ids)
    shape = RowShape(hidden_size=model.hidden_size, top_k=model.top_k, dtype=torch.float32)
    mesh = LocalMesh(LocalExpertMLP(checkpoint), placement, shape)
    link = LinkServer(replica_id="attention-0", max_model_len=MAX_MODEL_LEN, cluster_token=TOKEN)
    engine = Engine(runner, mesh, scheduler=SchedulerConfig(), publish=link.publish, max_model_len=MAX_MODEL_LEN)
    mesh.start(engine.on_header)
    engine.start()
    await link.start(engine)
    tier = AttentionTier(gateway_id="g", cluster_token=TOKEN)
    tier.set_replicas({link.replica_id: link.address})
    await tier.wait_connected(10)
    config = GenerationConfig(model="demo", max_model_len=MAX_MODEL_LEN, vocab_size=model.vocab_size)
    server = GatewayServer(config, tokenizer=TOKENIZER, tier=tier)
    try:
        async with AsyncClient(await server.start()) as client:
            yield client
        await server.drain(5)
        load = engine.load()
        assert (load.num_running, load.num_waiting) == (0, 0)
        assert load.num_free_kv_blocks == load.num_kv_blocks
    finally:
        await server.stop()
        await tier.close()
        await link.stop()
        engine.stop()
        mesh.close()


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
    async with demo() as client:

        async def ask(budget: int | None):
            options = {} if budget is None else {"thinking_budget": budget}
            stream = client.generate(question, include_token_ids=True, max_tokens=200, **options)
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
    async with demo() as client:
        messages = [{"role": "user", "content": "Use the calculator to compute 4821 + 377."}]
        stream = client.generate(messages, tools=[CALCULATOR])
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
        stream = client.generate(messages, tools=[CALCULATOR])
        assert "5198" in await stream.answer()
        assert stream.finished.reason is FinishReason.STOP


async def test_a_named_call_is_made_whether_the_model_thinks_or_not():
    async with demo() as client:
        for thinking in ("off", None):
            stream = client.generate(
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
