"""Messages to prompt text by the checkpoint's own chat template, rendered as Hugging Face renders it.

Same environment (sandboxed jinja2, blocks trimmed, loop controls, `raise_exception`, `strftime_now`, a `tojson` that
keeps key order and non-ASCII text), so a template gives the same string here and there. The model's family (hybrid,
instruct, thinking) is found by what the template does with `enable_thinking`, never by a name."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import Enum
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from ...errors import CheckpointError, InvalidRequest
from .tokenizer import Tokenizer


class Family(Enum):
    """What the template lets the model do."""

    HYBRID = "hybrid"  # thinks unless `enable_thinking` is false
    INSTRUCT = "instruct"  # the variable changes nothing, no block is opened
    THINKING = "thinking"  # the prompt itself opens the block


class ChatTemplate:
    """One compiled template. Rendering does not change it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template does not compile: {error}", file="chat_template.jinja") from error
        self._special_tokens = dict(special_tokens or {})
        self.family = self._find_family()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """None: the checkpoint has no template, only prompts and ids can be served."""
        template = tokenizer.chat_template
        return None if template is None else cls(template, tokenizer.special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """`enable_thinking` None is not passed. A template that refuses its input raises InvalidRequest."""
        variables: dict[str, Any] = dict(self._special_tokens)
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        try:
            return self._template.render(
                messages=messages,
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                "chat.messages", f"{len(messages)} messages", f"what the template takes: {error}"
            ) from error

    def _find_family(self) -> Family:
        probe = [{"role": "user", "content": "?"}]
        try:
            default = self.render(probe)
            opened = default[len(self.render(probe, add_generation_prompt=False)) :]
            switched_off = self.render(probe, enable_thinking=False)
        except (InvalidRequest, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the chat template fails on one user message: {error}", file="chat_template.jinja"
            ) from None
        if opened.rfind("<think>") > opened.rfind("</think>"):
            return Family.THINKING
        return Family.INSTRUCT if switched_off == default else Family.HYBRID


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)  # templates expect local time
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant wrote, for training masks; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  (the name and type that jinja2 asks for)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)
