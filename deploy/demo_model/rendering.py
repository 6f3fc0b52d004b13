"""Conversations to token ids, exactly as a server that uses the checkpoint's own chat template makes them.

`prompt` is what the model is given, `completion` what it should then write. They are encoded apart, because that is
what happens when the model is used: the prompt's ids are fixed before the first new id exists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

EMPTY_BLOCK = "<think>\n\n</think>\n\n"
EARLY_STOP = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    "</think>\n\n"
)


class ChatTemplate:
    """The Jinja template with the environment that transformers gives it."""

    def __init__(self, template: str) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        self._template = environment.from_string(template)

    def __call__(
        self, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]], enable_thinking: bool = True
    ) -> str:
        return self._template.render(
            messages=messages, tools=tools or None, enable_thinking=enable_thinking, add_generation_prompt=True
        )


class Codec:
    """Template and tokenizer of one checkpoint folder."""

    def __init__(self, directory: Path) -> None:
        self.render = ChatTemplate((directory / "chat_template.jinja").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.end_id, self.pad_id, self.think_end_id = (
            self.encode(token)[0] for token in ("<|im_end|>", "<|endoftext|>", "</think>")
        )
        self.early_stop_ids = self.encode(EARLY_STOP)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def prompt(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], enable_thinking: bool) -> list[int]:
        return self.encode(self.render(messages, tools=tools, enable_thinking=enable_thinking))
