"""The demo model through a real cluster: by the token what transformers says, and true.

A sample of `make eval-demo` (the whole held-out set) and of `make served-equals-offline` (1, 2 and 4 shards)."""

from collections.abc import Iterator

import pytest
import torch

from expertmesh.client import AnswerDelta, ToolCallDelta
from expertmesh.cluster.app import Cluster
from expertmesh.deploy.demo_model.evaluate import Reply, Request, evaluate, held_out_items
from expertmesh.deploy.demo_model.rendering import EARLY_STOP
from expertmesh.deploy.demo_model.served import Answer, Served, _Text, demo_config
from expertmesh.deploy.demo_model.served_equals_offline import (
    Comparison,
    Reference,
    Transcript,
    compare,
    conversations,
    transcribe,
)

BUDGET = 12


@pytest.fixture(scope="module")
def served(ray_runtime: None) -> Iterator[Served]:
    with Cluster(demo_config(num_shards=2)) as cluster, Served(cluster.gateways) as made:
        yield made


@pytest.fixture(scope="module")
def reference() -> Iterator[Reference]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Reference()
    torch.set_num_threads(threads)


@pytest.mark.ray
def test_ten_conversations_are_transformers_own_by_the_token_and_right(served: Served, reference: Reference):
    items = conversations(15)[5:]  # the tasks with tools, memory and several turns are the last ones
    expected = transcribe(reference, items, "think")
    found = transcribe(lambda requests: served.answers(requests, with_ids=True), items, "think")
    comparison = compare(expected, found)
    assert comparison.different == []
    assert comparison.num_identical + comparison.num_tied == len(items) == 10
    assert comparison.num_tied <= 1
    assert [(o.user, o.reply) for t in found for o in t.outcomes if not o.right] == []


@pytest.mark.ray
def test_the_switch_is_kept_and_memory_and_tools_work_without_thinking(served: Served):
    outcomes = evaluate(served, held_out_items(("memory", "tool", "greeting"), 2), "no_think")
    assert [(o.user, o.reply) for o in outcomes if not o.right] == []
    assert not any(outcome.thought for outcome in outcomes)


@pytest.mark.ray
def test_a_budget_is_exact_closed_and_answered(served: Served, reference: Reference):
    items = held_out_items(("multiply",), 3)
    requests = [Request(messages=item.messages(0), tools=[], mode="think", budget=BUDGET) for item in items]
    codec = reference.offline.codec
    for item, answer in zip(items, served.answers(requests, with_ids=True), strict=True):
        closing = codec.early_stop_ids
        assert list(answer.token_ids[BUDGET : BUDGET + len(closing)]) == closing
        assert codec.think_end_id not in answer.token_ids[:BUDGET]
        assert answer.reply.reasoning.endswith(EARLY_STOP.split("\n</think>")[0].strip())
        assert answer.reply.text.startswith(item.turns[0].answer.split(" = ")[0])


def test_a_typed_call_reads_as_the_model_wrote_it():
    text = _Text()
    text.add(AnswerDelta(1, "I call it."))
    text.add(ToolCallDelta(2, 0, "calculator", "", False))
    text.add(ToolCallDelta(3, 0, "", '{"expression": ', False))
    text.add(ToolCallDelta(4, 0, "", '"1 + 2"}', False))
    call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "1 + 2"}}\n</tool_call>'
    assert text.whole() == f"I call it.\n{call}"


def test_a_difference_is_found_and_a_tie_is_told_apart():
    def played(ids: tuple[int, ...], margins: tuple[float, ...]) -> list[Transcript]:
        item = conversations(1)[0]
        answer = Answer(reply=Reply(reasoning="", text=""), token_ids=ids, num_prompt_tokens=3, margins=margins)
        return [Transcript(item=item, mode="think", answers=[answer])]

    margins = (5.0, 0.00001, 5.0)
    same = compare(played((1, 2, 3), margins), played((1, 2, 3), ()))
    assert same == Comparison(num_identical=1, num_tokens=3)
    tied = compare(played((1, 2, 3), margins), played((1, 9, 3), ()))
    assert tied == Comparison(num_tied=1, num_tokens=1)
    other = compare(played((1, 2, 3), margins), played((1, 2, 9), ()))
    assert (other.num_identical, other.num_tied, len(other.different)) == (0, 0, 1)
    short = compare(played((1, 2, 3), (5.0, 5.0, 5.0)), played((1, 2), ()))
    assert len(short.different) == 1
