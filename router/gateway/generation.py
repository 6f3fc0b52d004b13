"""One generation at the gateway, whatever the transport: request in, events out.

    prepare: validate -> session.open -> prompt.ids (chat template, encode) -> sampling and thinking -> GenerationPlan
    run:     tier.generate -> conversation -> events with gapless offsets -> session.commit -> finished

`prepare` is here, `run` is `streaming.py`. The gRPC server writes the events as messages; any other front door writes
the same ones in its form."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ... import telemetry as names
from ...errors import ExpertMeshError, InvalidRequest, SessionStoreUnavailable
from ...proto import expertmesh_pb2 as pb
from ...request import EngineRequest, SamplingParams, ThinkingBudget
from ...telemetry import Telemetry
from . import validation
from .api_keys import prefix_salt
from .committed_turn import CommittedTurn
from .contracts import Sessions, Tier
from .conversation import State, prompt_state
from .forced_call import call_beginning
from .pending import PendingCommits
from .plan import CLOSING_TEXT, GenerationConfig, GenerationPlan, closing_ids, turn_settings
from .prompt import Prompts
from .response_format import answer_grammar, check_format
from .session import SessionRecord
from .streaming import Generation, Shared
from .tokenizer import Tokenizer

__all__ = [
    "CLOSING_TEXT",
    "CommittedTurn",
    "Generation",
    "GenerationConfig",
    "GenerationPlan",
    "Generations",
    "Sessions",
    "Tier",
    "record_failure",
]


class Generations:
    """Makes generations. Holds what they share; nothing of any request."""

    def __init__(
        self,
        config: GenerationConfig,
        *,
        tokenizer: Tokenizer,
        tier: Tier,
        sessions: Sessions | None,
        telemetry: Telemetry | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        new_seed: Callable[[], int] = lambda: secrets.randbits(63),
    ) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.pending = None if sessions is None else PendingCommits(sessions)
        self._shared = Shared(
            model=config.model,
            tokenizer=tokenizer,
            tier=tier,
            sessions=sessions,
            pending=self.pending,
            telemetry=telemetry or Telemetry.off(),
            clock=clock,
            wall_clock=wall_clock,
        )
        self._sessions, self._clock, self._wall_clock, self._new_seed = sessions, clock, wall_clock, new_seed
        self._prompts = Prompts(config, tokenizer)
        self._closing_ids = closing_ids(config.closing_text, tokenizer)

    async def prepare(
        self, request: pb.GenerateRequest, *, owner: str = "", remaining_s: float | None = None, traceparent: str = ""
    ) -> Generation | CommittedTurn:
        """Check the request and make everything the engine needs; no work has started when this returns."""
        received_at = self._clock()
        validation.check_input(request)
        check_format(request)
        stop = validation.stop_strings(request.sampling)
        tools = validation.tool_definitions(request.tools, request.tool_choice)
        turn = await self._open_turn(request, tools, owner)
        if turn.committed_at is not None:
            assert turn.session is not None
            return CommittedTurn(self.config.model, turn.session, turn.committed_at, turn.messages, owner)
        spliced = self._prompts.splice(turn.session, turn.settings)
        prompt_ids = await self._prompts.ids(request, turn.messages, turn.session, tools, turn.thinking, spliced)
        state = prompt_state(prompt_ids, self.tokenizer.special_ids)
        grammar = await answer_grammar(
            request, self.tokenizer, state, tools=bool(tools), vocab_size=self._prompts.vocab_size
        )
        engine_request = EngineRequest(
            request_id=request.request_id or secrets.token_hex(12),
            prompt_ids=tuple(prompt_ids),
            sampling=self._sampling(request, len(prompt_ids)),
            thinking=self._budget(turn.thinking, state),
            grammar=grammar,
            deadline=0.0 if remaining_s is None or request.resumable else self._wall_clock() + remaining_s,
            prefix_salt=prefix_salt(owner),
            traceparent=traceparent,
        )
        plan = GenerationPlan(
            request=engine_request,
            state=state,
            stop=stop,
            strip_answer=request.HasField("chat") and not request.HasField("response_format"),
            tools=bool(tools),
            forced_call=self._forced_call(request.tool_choice),
            include_token_ids=request.include_token_ids,
            owner=owner,
            messages=turn.messages,
            session=turn.session,
            settings=turn.settings,
            num_spliced=len(spliced),
            began_at=self._wall_clock(),
        )
        return Generation(self._shared, plan, received_at=received_at)

    def go_on(self, plan: GenerationPlan) -> Generation:
        """The generation of a plan that was made before, here or elsewhere (`resume.py`)."""
        return Generation(self._shared, plan, received_at=self._clock())

    async def _open_turn(self, request: pb.GenerateRequest, tools: list[dict[str, Any]], owner: str) -> "_Turn":
        messages = validation.chat_messages(request.chat) if request.HasField("chat") else []
        if not request.session_id:
            return _Turn(messages, request.thinking, {})
        if self._sessions is None:
            raise SessionStoreUnavailable("this gateway has no session store; send the whole chat instead")
        assert self.pending is not None
        self.pending.check(request.session_id, owner)
        session = await self._sessions.open(request.session_id, owner)
        for index, turn in enumerate(session.turns):
            if request.request_id and turn.request_id == request.request_id:
                return _Turn(messages, request.thinking, {}, session, index)
        thinking, settings = turn_settings(request, session, tools)
        return _Turn(messages, thinking, settings, session)

    def _budget(self, thinking: pb.ThinkingOptions, state: State) -> ThinkingBudget | None:
        if not thinking.HasField("budget_tokens") or state is State.CLOSED:
            return None
        budget, special = thinking.budget_tokens, self.tokenizer.special_ids
        if special.think is None or special.end_think is None:
            raise InvalidRequest("thinking.budget_tokens", budget, "unset: this model's vocabulary has no think tokens")
        if max(self._closing_ids) >= self._prompts.vocab_size:
            raise InvalidRequest(
                "thinking.budget_tokens", budget, "unset: the closing sentence is not in the vocabulary"
            )
        return ThinkingBudget(
            budget_tokens=budget,
            think_id=special.think,
            end_think_id=special.end_think,
            closing_ids=self._closing_ids,
            starts_inside=state is State.REASONING,
        )

    def _forced_call(self, choice: pb.ToolChoice) -> tuple[int, ...]:
        if choice.mode not in (pb.ToolChoice.REQUIRED, pb.ToolChoice.NAMED):
            return ()
        if self.tokenizer.special_ids.tool_call is None:
            raise InvalidRequest("tool_choice", "set", "AUTO or NONE: this model's vocabulary has no tool call tokens")
        ids = call_beginning(self.tokenizer, choice.name)
        if max(ids) >= self._prompts.vocab_size:
            raise InvalidRequest("tool_choice", "set", "AUTO or NONE: the call's beginning is not in the vocabulary")
        return ids

    def _sampling(self, request: pb.GenerateRequest, num_prompt_tokens: int) -> SamplingParams:
        return validation.sampling_params(
            request.sampling,
            self.tokenizer.defaults,
            eos=self.tokenizer.special_ids.eos,
            vocab_size=self._prompts.vocab_size,
            room=self.config.max_model_len - num_prompt_tokens,
            seed=self._new_seed(),
        )


@dataclass(frozen=True, slots=True)
class _Turn:
    """What the session adds to a request."""

    messages: list[dict[str, Any]]  # new in this turn
    thinking: pb.ThinkingOptions  # in force
    settings: dict[str, Any]  # of the session from this turn on
    session: SessionRecord | None = None
    committed_at: int | None = None  # index of the turn, where it is a retry of a committed one


def record_failure(telemetry: Telemetry, error: ExpertMeshError) -> None:
    telemetry.record(names.METRIC_REQUESTS, 1, outcome=error.code)
