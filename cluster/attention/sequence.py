"""One request inside the engine: the tokens it knows, how many of them are in KV, and which blocks hold them.

Why one record: the scheduler has no prefill phase. A sequence has *known* tokens (prompt, then everything accepted) and
*computed* tokens (those whose KV is written); a step moves the second towards the first. Prompt, chunk, decode, replay
after preemption and replay after failover differ only in how far apart the two numbers are. Where steps run ahead of
the host, the last known tokens are *unseen*: a step in flight draws them, and the next one reads them on the device.
Idea: vLLM v1's scheduler."""

from dataclasses import dataclass, field

import numpy as np

from ...request import EngineRequest, FinishReason
from .grammar import GrammarState
from .kv_cache import BlockTable
from .thinking import ThinkingState

UNSEEN = -1  # stands for a token that a step in flight draws


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable; owned by the engine thread."""

    request: EngineRequest
    arrival: int  # order of submission; smaller is older
    arrived_at: float  # seconds, the engine's clock
    token_ids: np.ndarray  # [capacity] int64, valid up to num_tokens: prompt, then output
    num_prompt_tokens: int
    num_tokens: int  # known, unseen ones included
    table: BlockTable
    thinking: ThinkingState | None = None
    grammar: GrammarState | None = None  # of the answer
    num_computed_tokens: int = 0  # in KV, or written by a step in flight
    num_unseen: int = 0  # of the known tokens, the last ones
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache when first admitted
    num_preemptions: int = 0
    admitted_at: float = -1.0  # -1 = never yet
    published: bool = False  # first tokens are out
    finish_reason: FinishReason = field(default=FinishReason.NONE)

    @classmethod
    def of(
        cls,
        request: EngineRequest,
        *,
        arrival: int = 0,
        arrived_at: float = 0.0,
        grammar: GrammarState | None = None,
    ) -> "Sequence":
        num_prompt, num_output = len(request.prompt_ids), len(request.output_ids)
        token_ids = np.empty(num_prompt + num_output + 32, dtype=np.int64)
        token_ids[:num_prompt] = request.prompt_ids
        token_ids[num_prompt : num_prompt + num_output] = request.output_ids
        thinking = ThinkingState(request.thinking) if request.thinking is not None else None
        sequence = cls(
            request=request,
            arrival=arrival,
            arrived_at=arrived_at,
            token_ids=token_ids,
            num_prompt_tokens=num_prompt,
            num_tokens=num_prompt + num_output,
            table=BlockTable(salt=request.prefix_salt),
            thinking=thinking,
            grammar=grammar,
        )
        for token_id in request.output_ids:
            sequence._fold(token_id)
        return sequence

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Known and not yet computed; 1 is a decode."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def output_ids(self) -> np.ndarray:
        return self.token_ids[self.num_prompt_tokens : self.num_tokens]

    def expect(self) -> None:
        """A step draws one more output token, which is not seen yet."""
        if self.num_tokens == len(self.token_ids):
            grown = np.empty(2 * self.num_tokens, dtype=np.int64)
            grown[: self.num_tokens] = self.token_ids
            self.token_ids = grown
        self.token_ids[self.num_tokens] = UNSEEN
        self.num_tokens += 1
        self.num_unseen += 1

    def retract(self) -> None:
        """The newest expected token will not come: its step is void."""
        assert self.num_unseen, "nothing is expected"
        self.num_tokens -= 1
        self.num_unseen -= 1

    def see(self, token_id: int) -> None:
        """Accept the oldest expected token."""
        assert self.num_unseen, "nothing is expected"
        self.token_ids[self.num_tokens - self.num_unseen] = token_id
        self.num_unseen -= 1
        self._fold(token_id)

    def _fold(self, token_id: int) -> None:
        """What the next token may be follows from those accepted."""
        forced = False
        if self.thinking is not None:
            forced = self.thinking.forced_id is not None
            self.thinking.accept(token_id)
        if self.grammar is not None:
            self.grammar.accept(token_id, forced=forced)

    def is_full(self, max_model_len: int) -> bool:
        """Its last known token ends it, whatever that is: no step need compute more."""
        return self.num_output_tokens >= self.request.sampling.max_tokens or self.num_tokens >= max_model_len

    def finish_after(self, token_id: int, *, forced: bool, max_model_len: int) -> FinishReason:
        """Why the sequence ends now that `token_id` is the last one seen; NONE = it goes on.

        A stop id ends it (the id stays part of the output) unless the token was forced by the thinking budget."""
        sampling, num_output = self.request.sampling, self.num_output_tokens - self.num_unseen
        if not forced and token_id in sampling.stop_token_ids and num_output > sampling.min_tokens:
            return FinishReason.STOP
        if num_output >= sampling.max_tokens or self.num_tokens - self.num_unseen >= max_model_len:
            return FinishReason.LENGTH
        return FinishReason.NONE
