"""What one step of an attention replica did, for telemetry: counts of tokens and where its time went."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from ...errors import ExchangeError
from ...request import EngineLoad
from ...router.contracts import StepContext
from ...router.epoch import StepHeader
from .batch import ScheduledTokens
from .runner import StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """No tokens = it only served its experts to others. `forward_s` is the attention tier's own part."""

    header: StepHeader
    started_at: float  # unix seconds
    schedule_s: float  # entering the epoch, choosing and building the batch
    forward_s: float
    exchange_s: float
    expert_s: float
    sample_s: float
    publish_s: float
    num_decode_tokens: int
    num_prefill_tokens: int
    num_running: int
    num_waiting: int
    num_free_kv_blocks: int
    num_kv_blocks: int
    num_preemptions: int  # since start
    request_traceparents: tuple[str, ...]
    error: BaseException | None = None  # the step failed and will be run again

    @classmethod
    def of(
        cls,
        step: StepContext,
        scheduled: Seq[ScheduledTokens],
        result: StepResult | None,
        load: EngineLoad,
        *,
        started_at: float,
        schedule_s: float,
        publish_s: float,
        num_preemptions: int,
        error: ExchangeError | None,
    ) -> "StepStats":
        """`result` is None where this rank only served, or the step failed."""
        num_decode = sum(1 for item in scheduled if item.num_tokens == 1)
        return cls(
            header=step.header,
            started_at=started_at,
            schedule_s=schedule_s,
            forward_s=result.forward_s - step.exchange_s - step.expert_s if result is not None else 0.0,
            exchange_s=step.exchange_s,
            expert_s=step.expert_s,
            sample_s=result.sample_s if result is not None else 0.0,
            publish_s=publish_s,
            num_decode_tokens=num_decode,
            num_prefill_tokens=sum(item.num_tokens for item in scheduled) - num_decode,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_free_kv_blocks=load.num_free_kv_blocks,
            num_kv_blocks=load.num_kv_blocks,
            num_preemptions=num_preemptions,
            request_traceparents=tuple(t for item in scheduled if (t := item.sequence.request.traceparent)),
            error=error,
        )


class StepObserver(Protocol):
    """Called from the engine thread once a step, after its tokens are out; must not block or raise."""

    def observe(self, stats: StepStats) -> None: ...
