"""A request, checked and resolved: all that a generation is made of. Pure."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from ...errors import ConfigError, InvalidRequest
from ...proto import expertmesh_pb2 as pb
from ...request import EngineRequest
from .conversation import State
from .session import SessionRecord
from .tokenizer import Tokenizer

CLOSING_TEXT = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    "</think>\n\n"
)  # Qwen3's documentation; ends the think block when its budget is spent


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """What the gateway knows about the served model."""

    model: str  # name told to clients
    max_model_len: int  # tokens of prompt and output together
    vocab_size: int  # rows of the embedding; ids that the tokenizer does not know are refused whatever this is
    closing_text: str = CLOSING_TEXT


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPlan:
    """A request, checked and resolved: all that a generation is made of (a stream's journal begins with it)."""

    request: EngineRequest
    state: State  # where the prompt leaves the model
    stop: tuple[str, ...] = ()
    strip_answer: bool = True
    tools: bool = False
    forced_call: tuple[int, ...] = ()  # how the call begins that must come
    include_token_ids: bool = False
    owner: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)  # new in this turn
    session: SessionRecord | None = None
    settings: dict[str, Any] = field(default_factory=dict)  # of the session from this turn on
    num_spliced: int = 0  # prompt ids taken from earlier turns
    began_at: float = 0.0  # unix seconds; of the first try where the stream goes on elsewhere


def closing_ids(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of the sentence that ends a think block whose budget is spent. ConfigError unless it closes the block once,
    at its end, as the model's template does: the answer, or a call that must come, begins right behind it."""
    special, ids = tokenizer.special_ids, tuple(tokenizer.encode(text))
    if special.think is None or special.end_think is None:
        return ids  # no budget is ever taken for this model
    tail = (special.end_think, *tokenizer.encode("\n\n"))
    inside = ids[: -len(tail)]
    if ids[-len(tail) :] != tail or not {special.think, special.end_think, *special.special}.isdisjoint(inside):
        raise ConfigError("thinking_closing_text", text, "a sentence without tags, then </think> and two newlines")
    return ids


def turn_settings(
    request: pb.GenerateRequest, session: SessionRecord, tools: list[dict[str, Any]]
) -> tuple[pb.ThinkingOptions, dict[str, Any]]:
    """What is in force for this turn and from it on: the session's settings, and what the request sets anew."""
    settings, thinking = dict(session.settings), request.thinking
    if thinking.mode:
        settings["thinking_mode"] = thinking.mode
        if thinking.mode == pb.ThinkingOptions.ON and settings.get("budget_tokens") == 0:
            del settings["budget_tokens"]
    if thinking.HasField("budget_tokens"):
        settings["budget_tokens"] = thinking.budget_tokens
    if request.history_policy:
        settings["history_policy"] = request.history_policy
    if tools and settings.get("history_policy") == pb.HISTORY_POLICY_KEEP_THINKING:
        digest = hashlib.sha256(json.dumps(tools).encode()).hexdigest()[:16]
        if session.turns and settings.setdefault("tools", digest) != digest:
            raise InvalidRequest(
                "tools", "changed", "the tools that the session began with: KEEP_THINKING splices them"
            )
        settings["tools"] = digest
    mode, budget = settings.get("thinking_mode", 0), settings.get("budget_tokens")
    return pb.ThinkingOptions(mode=mode, budget_tokens=budget), settings
