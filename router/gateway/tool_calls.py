"""One Hermes tool call as its text comes: `{"name": .., "arguments": {..}}` between two tags. Pure.

The name is known as soon as the head is there and the arguments then stream as they are written. At the end the whole
text is read as JSON, which alone decides: where it is not a call, what was held back is given as text and the call is
marked malformed. So for any way of cutting, the joined pieces are the same, and nothing the model wrote is lost.

A text whose head has another form (arguments first, arguments as a string, no arguments) is held to its end."""

import json
import re
from dataclasses import dataclass
from typing import Any

# The head as Qwen3 is trained to write it, up to the brace that opens the arguments.
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
MAX_HEAD_CHARS = 512  # a longer head is not waited for: the call is held to its end


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that ended. `arguments_text` of a malformed one is the raw text after its name, if it has one."""

    name: str
    arguments_text: str
    malformed: bool
    text: str  # all between the tags


class ToolCallParser:
    """`push` text, then `finish` once. `name` is set when it is known; pushes give pieces of the arguments' text."""

    __slots__ = ("_depth", "_escaped", "_given", "_headless", "_held", "_in_string", "_text", "name")

    def __init__(self) -> None:
        self.name = ""
        self._text: list[str] = []  # everything
        self._headless = False  # no head in the first MAX_HEAD_CHARS
        self._held = ""  # not given yet: the head, or what follows the arguments
        self._given: list[str] = []  # arguments
        self._depth = 0  # of braces and brackets inside the arguments; 0 after them
        self._in_string = self._escaped = False

    def push(self, text: str) -> str:
        self._text.append(text)
        if not self.name:
            self._held += text
            return self._read_head()
        if not self._depth:
            self._held += text
            return ""
        return self._read_arguments(text)

    def finish(self) -> tuple[str, ToolCall]:
        """The last piece of the arguments, and the call."""
        whole = "".join(self._text)
        found = read_call(whole)
        if self.name:
            good = found is not None and found[0] == self.name and not self._depth
            piece = "" if good else self._held
            return piece, ToolCall(self.name, "".join(self._given) + piece, not good, whole)
        if found is not None:
            self.name, piece = found
            return piece, ToolCall(self.name, piece, False, whole)
        piece = whole.strip("\n")
        return piece, ToolCall("", piece, True, whole)

    def _read_head(self) -> str:
        if self._headless:
            return ""
        head = _HEAD.match(self._held, 0, MAX_HEAD_CHARS)
        name = _string(head[1]) if head is not None else ""
        if head is None or not name:
            self._headless = len(self._held) >= MAX_HEAD_CHARS
            return ""
        rest, self._held, self.name = self._held[head.end() :], "", name
        return self._read_arguments(rest)

    def _read_arguments(self, text: str) -> str:
        """Give `text` up to the brace that closes the arguments, hold what follows."""
        for position, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    self._held = text[position + 1 :]
                    text = text[: position + 1]
                    break
        self._given.append(text)
        return text


def read_call(text: str) -> tuple[str, str] | None:
    """Name and JSON text of the arguments, or None where the text is not a call."""
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            return None
        name, arguments = value.get("name"), value.get("arguments", {})
        if isinstance(arguments, str):  # JSON inside a string
            arguments = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)


def _string(literal: str) -> str:
    try:
        value: Any = json.loads(literal)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""
