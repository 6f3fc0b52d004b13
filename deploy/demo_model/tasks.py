"""What the demo model can be asked: items with messages, tools, step by step thinking, the answer and its checker.

`make_item(task, seed, held_out=...)` is a pure function of its arguments. One item is one conversation; each of its
turns is one user message with the thinking and the answer the model should give, and a check that accepts any wording
with the right values. Held-out items use operand pairs that training never draws (`arithmetic.is_held_out`) and their
own range of seeds."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

CheckKind = Literal["number", "numbers", "last_word", "words", "phrase"]
Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """How an answer is judged: `value` must be found in the text in the way that `kind` says."""

    kind: CheckKind
    value: tuple[str, ...]
    choices: tuple[str, ...] = ()  # the closed list whose members count as "words"

    def accepts(self, text: str) -> bool:
        if self.kind in ("number", "numbers"):
            found = [number.replace("−", "-") for number in re.findall(r"(?<![\d.])[-−]?\d+", text)]
            wanted = list(self.value)
            return bool(found) and (found[-1:] if self.kind == "number" else found) == wanted
        if self.kind == "phrase":
            return self.value[0] in text
        pattern = "|".join(re.escape(choice) for choice in sorted(self.choices, key=len, reverse=True))
        found = re.findall(rf"(?:{pattern})", text)
        return bool(found) and (found[-1:] if self.kind == "last_word" else found) == list(self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The call a turn needs first, what the tool returns, and the thinking that precedes the call."""

    name: str
    arguments: Json
    result: str
    thinking: str

    @property
    def text(self) -> str:
        """The call as the model must write it (Hermes form)."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return f'<tool_call>\n{{"name": "{self.name}", "arguments": {arguments}}}\n</tool_call>'


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    user: str
    thinking: str
    answer: str
    check: Check
    task: str = ""
    tool: ToolUse | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    task: str
    turns: tuple[Turn, ...]
    system: str = ""
    tools: tuple[Json, ...] = ()
    scored: tuple[int, ...] = (-1,)  # the turns that count in an evaluation

    def messages(self, turn_id: int) -> list[Json]:
        """The conversation up to the user message of `turn_id`, earlier turns answered as the item says."""
        messages: list[Json] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns[:turn_id]:
            messages += [{"role": "user", "content": turn.user}, *tool_messages(turn, thinking="")]
            messages.append({"role": "assistant", "content": turn.answer})
        return [*messages, {"role": "user", "content": self.turns[turn_id].user}]


def tool_messages(turn: Turn, *, thinking: str) -> list[Json]:
    """The assistant's call and the tool's response inside a turn; empty without a tool."""
    if turn.tool is None:
        return []
    function = {"name": turn.tool.name, "arguments": turn.tool.arguments}
    call: Json = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    if thinking:
        call["reasoning_content"] = thinking
    return [call, {"role": "tool", "content": turn.tool.result}]


def parse_tool_call(text: str) -> tuple[str, Json] | None:
    """Name and arguments of the one tool call in `text`, None if there is none or it is malformed."""
    calls = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", text, flags=re.DOTALL)
    if len(calls) != 1:
        return None
    try:
        call = json.loads(calls[0])
    except ValueError:
        return None
    if not isinstance(call, dict) or set(call) != {"name", "arguments"} or not isinstance(call["arguments"], dict):
        return None
    return call["name"], call["arguments"]


Maker = Callable[[random.Random, bool], Item]


def make_item(task: str, seed: int, *, held_out: bool = False) -> Item:
    """The item of `task` number `seed`; the same for ever, and of another range of seeds if it is held out."""
    from . import questions

    return questions.MAKERS[task](random.Random(f"{'held-out' if held_out else 'train'}/{task}/{seed}"), held_out)
