"""Streams to break and to compare: requests to the demo model, and what a stream says whatever its cuts."""

from collections.abc import Sequence
from typing import Any

from ..client import AnswerDelta, Event, Finished, ReasoningDelta, Started, ToolCallDelta

CALCULATOR = {
    "name": "calculator",
    "description": "Computes an expression.",
    "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
}
# Text and options; each draws with a seed of its own, so that every token depends on all before it.
REQUESTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("What is 17 + 25?", {"thinking": "on", "seed": 1}),
    ("What is 6 * 7?", {"thinking": "on", "thinking_budget": 12, "seed": 2}),
    ("My name is Emma. I live in Paris.", {"thinking": "off", "temperature": 1.0, "seed": 3}),
    ("What is 48 - 19?", {"thinking": "on", "temperature": 1.2, "seed": 4}),
    ("Use the calculator to compute 4821 * 37.", {"tools": [CALCULATOR], "seed": 5}),
)
OPTIONS: dict[str, Any] = {"max_tokens": 64, "include_token_ids": True, "resumable": True}


def folded(events: Sequence[Event]) -> list[tuple[Any, ...]]:
    """What a stream says: tokens that came in one event or in several are the same. AssertionError: its offsets have a
    gap, or it did not begin or end as a stream does."""
    assert [e.offset for e in events] == list(range(len(events))), "an event is lost, repeated or out of order"
    assert isinstance(events[0], Started), "no started event"
    assert isinstance(events[-1], Finished), "no finished event"
    found: list[tuple[Any, ...]] = [(events[0].seed, events[0].prompt_tokens)]
    for event in events[1:-1]:
        assert isinstance(event, ReasoningDelta | AnswerDelta | ToolCallDelta), "a second beginning or end"
        call = isinstance(event, ToolCallDelta)
        text = event.arguments_text if isinstance(event, ToolCallDelta) else event.text
        key = (type(event).__name__, event.index if isinstance(event, ToolCallDelta) else 0)
        name = event.name if isinstance(event, ToolCallDelta) else ""
        if found[-1][:2] == key and not (call and name):
            _, _, name, before, ids = found.pop()
            found.append((*key, name, before + text, ids + event.token_ids))
        else:
            found.append((*key, name, text, event.token_ids))
    last = events[-1]
    found.append((last.reason.name, last.prompt_tokens, last.completion_tokens, last.reasoning_tokens))
    return found


def token_ids(events: Sequence[Event]) -> list[int]:
    deltas = (e for e in events if isinstance(e, ReasoningDelta | AnswerDelta | ToolCallDelta))
    return [i for event in deltas for i in event.token_ids]
