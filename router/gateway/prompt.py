"""The prompt of a request as ids: chat template, history of the session, ids spliced from earlier turns, bounds.

The template is rendered on text and the text is encoded; with KEEP_THINKING what was said before is spliced as the ids
that it was, so that a turn's prompt begins with the whole turn before."""

import asyncio
from collections.abc import Sequence
from typing import Any

from ...errors import InvalidRequest
from ...proto import expertmesh_pb2 as pb
from . import validation
from .chat import ChatTemplate, Family
from .plan import GenerationConfig
from .session import SessionRecord
from .tokenizer import Tokenizer

ENCODE_INLINE_CHARS = 16_384  # longer prompts are encoded in a thread


class Prompts:
    """Makes prompts for one checkpoint."""

    def __init__(self, config: GenerationConfig, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate.of(tokenizer)
        self.max_model_len = config.max_model_len
        self.vocab_size = min(config.vocab_size, tokenizer.vocab_size)
        self._turn_end_ids = self._find_turn_end()

    async def ids(
        self,
        request: pb.GenerateRequest,
        messages: list[dict[str, Any]],
        session: SessionRecord | None,
        tools: list[dict[str, Any]],
        thinking: pb.ThinkingOptions,
        spliced: list[int],
    ) -> Sequence[int]:
        """`thinking` is what is in force; `spliced` (from `splice`) stands for everything before this turn."""
        if request.HasField("token_ids"):
            validation.check_token_ids("token_ids.ids", request.token_ids.ids, self.vocab_size)
            ids: Sequence[int] = request.token_ids.ids
            field = "token_ids"
        else:
            field = "chat" if messages else "prompt"
            text = request.prompt
            if messages:
                history = session.messages if session is not None and not spliced else []
                text = self._render([*history, *messages], [] if spliced else tools, thinking)
            ids = [*spliced, *await self._encode(field, text)]
        if len(ids) >= self.max_model_len:
            raise InvalidRequest(
                field,
                f"{len(ids)} tokens",
                f"at most {self.max_model_len - 1}, the context of {self.max_model_len} less one",
            )
        return ids

    def splice(self, session: SessionRecord | None, settings: dict[str, Any]) -> list[int]:
        """With KEEP_THINKING, the ids of the conversation so far as they were: prompt and output of every turn."""
        if session is None or settings.get("history_policy") != pb.HISTORY_POLICY_KEEP_THINKING:
            return []
        ids: list[int] = []
        for turn in session.turns:
            if not turn.input_ids or not turn.num_spliced:
                ids = []  # not kept, or its prompt held all that was before
            if not turn.input_ids:
                continue
            output = list(turn.output_ids)
            while output and output[-1] in self.tokenizer.special_ids.eos:
                output.pop()
            ids += [*turn.input_ids, *output, *self._turn_end_ids]
        return ids

    async def _encode(self, field: str, text: str) -> list[int]:
        special = field == "prompt"  # a template writes its own
        if len(text) <= ENCODE_INLINE_CHARS:
            ids = self.tokenizer.encode(text, add_special_tokens=special)
        else:
            ids = await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=special)
        if not ids:
            raise InvalidRequest(field, "no tokens", "text that encodes to at least one token")
        if max(ids) >= self.vocab_size:
            raise InvalidRequest(field, max(ids), f"text in the model's vocabulary of {self.vocab_size} ids")
        return ids

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], thinking: pb.ThinkingOptions) -> str:
        if self.template is None:
            raise InvalidRequest("chat", "set", "prompt or token_ids: this model has no chat template")
        enable = _enable_thinking(thinking, self.template.family)
        return self.template.render(messages, tools=tools, enable_thinking=enable)

    def _find_turn_end(self) -> tuple[int, ...]:
        """What the template puts behind an assistant's message."""
        if self.template is None:
            return ()
        probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "ANSWER"}]
        text = self.template.render(probe, add_generation_prompt=False).rpartition("ANSWER")[2]
        return tuple(self.tokenizer.encode(text))


def _enable_thinking(options: pb.ThinkingOptions, family: Family) -> bool | None:
    """The template's variable; None is not passed."""
    off = options.mode == pb.ThinkingOptions.OFF
    if options.mode == pb.ThinkingOptions.ON and family is Family.INSTRUCT:
        raise InvalidRequest("thinking.mode", "ON", "DEFAULT or OFF: this model never thinks")
    if off and family is Family.THINKING:
        raise InvalidRequest("thinking.mode", "OFF", "DEFAULT or ON: this model always thinks")
    if off or (options.HasField("budget_tokens") and options.budget_tokens == 0):
        return False
    return True if options.mode == pb.ThinkingOptions.ON else None
