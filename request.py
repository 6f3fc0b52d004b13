"""What a generation is between the gateway and the engine: its input, its sampling, and what one step gave it.

These are the values that cross the link (`proto/expertmesh.proto`, Submit and RequestTokens). Every default is resolved
by the gateway from generation_config.json, so the engine decides nothing about them."""

from dataclasses import dataclass, field
from enum import IntEnum


class FinishReason(IntEnum):
    """Numbers are those of `expertmesh.v1.FinishReason`."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    TOOL_CALLS = 3
    CANCELLED = 4
    ERROR = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. `temperature` 0 is greedy; `top_k` 0 is off; `num_logprobs` -1 is none."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0  # uint64; the draw at an output position depends on (seed, position) alone
    max_tokens: int = 16
    min_tokens: int = 0
    presence_penalty: float = 0.0  # over the output
    frequency_penalty: float = 0.0  # over the output
    repetition_penalty: float = 1.0  # over prompt and output
    stop_token_ids: frozenset[int] = frozenset()  # the model's own included, unless ignore_eos
    num_logprobs: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingBudget:
    """The contract that at most `budget_tokens` are spent inside the think block, enforced beside the sampler."""

    budget_tokens: int
    think_id: int
    end_think_id: int
    closing_ids: tuple[int, ...]
    starts_inside: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerGrammar:
    """What the answer must match, enforced beside the sampler. Ids are -1 where there is none.

    Thinking is free: the grammar begins where the block ends, or with the first token where there is none."""

    kind: str  # json_schema, regex, choice
    source: str  # the schema, the regular expression, a JSON list of the choices
    starts_inside: bool = False  # the prompt opened the think block
    think_id: int = -1  # opens the block instead of the answer's first token
    end_think_id: int = -1
    separator_id: int = -1  # may stand once between the block and the answer, of which it is no part
    tool_call_id: int = -1  # instead of the answer's first token: from there on the output is free


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One generation as the engine sees it. `output_ids` not empty = replay (failover): go on after them."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    output_ids: tuple[int, ...] = ()
    thinking: ThinkingBudget | None = None
    grammar: AnswerGrammar | None = None
    deadline: float = 0.0  # unix seconds, 0 = none
    prefix_salt: bytes = b""
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


@dataclass(slots=True)
class RequestOutput:
    """What one step gave one request. `finish_reason` NONE = it goes on."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason = FinishReason.NONE
    num_cached_tokens: int = 0  # set with the first tokens
    queue_s: float = 0.0  # set with the first tokens
    logprobs: list[TokenLogprob] = field(default_factory=list)
    error_code: str = ""  # gRPC status name where finish_reason is ERROR
    error_message: str = ""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Numbers a balancer needs; blocks are KV blocks."""

    num_running: int
    num_waiting: int
    num_free_kv_blocks: int
    num_kv_blocks: int
    draining: bool = False
