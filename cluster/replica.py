"""The Serve deployment of one attention replica: link server on the event loop, engine thread behind it.

Start: load own weights and size the KV pool, open the link, join the Conductor; the first epoch makes it READY. In the
colocated layout the process also owns experts: one rank, both roles, the same code path. Tokens leave on the link, a
message a step; Serve's handles are never used."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..checkpoint import Checkpoint, LoadProgress, ProgressCallback
from ..config import ClusterConfig
from ..errors import ExpertMeshError, Unavailable
from ..experts.copies import CopyServer
from ..experts.expert_load import ExpertLoad
from ..experts.mlp import LocalExpertMLP
from ..experts.scrub import Scrubber
from ..experts.worker import (
    LEAVE_S,
    MakeAgent,
    compute_device,
    compute_dtype,
    config_here,
    expert_bytes_of_rank,
    faults_of,
    guard_gauges,
    in_first_epoch,
    is_batch_invariant,
    load_experts,
    node_name,
    own_metrics_port,
    replica_name,
    row_shape,
    settle_on_cpu,
    start_copies,
    start_scrub,
    state_of,
    take_copies,
)
from ..model_source import open_model
from ..request import EngineLoad
from ..router.gateway.link import LinkServer
from ..router.heap import freeze_heap
from ..router.mesh import ClusterMesh, MeshOptions
from ..router.status import ConductorLink, ProcessStatus, report_failure, report_forever, report_rows_forever
from ..startup_phases import StartupPhases
from ..telemetry import (
    ATTR_EPOCH,
    ATTR_NUM_TOKENS,
    ATTR_STEP_ID,
    METRIC_EXPERT_SECONDS,
    METRIC_KV_TOTAL,
    METRIC_KV_USED,
    METRIC_RUNNING,
    METRIC_STEP,
    METRIC_STEP_TOKENS,
    METRIC_WAITING,
    SPAN_STEP,
    Gauge,
    Telemetry,
    configure,
)
from .attention.engine import Engine, StepStats
from .attention.grammar import GrammarCompiler
from .attention.load import load_runner
from .attention.runner import StepRunner
from .attention.warm_up import WarmUp
from .autoscale import attention_pressure
from .request_spans import RequestSpans

DRAIN_S = 20.0  # requests at hand finish; with LEAVE_S below Serve's graceful_shutdown_timeout_s
_log = logging.getLogger(__name__)


class AttentionReplica:
    """One replica. `__init__` returns when it has asked to join; it is READY when its epoch is committed."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config_text: str, conductor: ConductorLink, make_agent: MakeAgent
    ) -> None:
        config = config_here(config_text)
        self._colocated = config.layout == "colocated"
        self._role = "colocated" if self._colocated else "attention"
        self.member_id, self._conductor = replica_name(self._role), conductor
        self._detail, self._draining, self._phases = "", False, StartupPhases()
        self._max_num_seqs = config.scheduler.max_num_seqs
        self._engine: Engine | None = None
        self._scrubber: Scrubber | None = None
        self._copies: CopyServer | None = None  # of one that owns experts
        self._row_reporter: asyncio.Task[None] | None = None  # of one that owns experts
        self._warming: asyncio.Task[None] | None = None
        self._warm_up: WarmUp | None = None
        self._is_warm = False  # gateways dial from then on
        settle_on_cpu()
        self._reporter = asyncio.create_task(report_forever(conductor, self._status))
        try:
            self._engine = await self._build(config, make_agent)
        except Exception as error:
            self._reporter.cancel()
            await report_failure(conductor, self.member_id, error)
            raise
        if self._load is not None:
            self._row_reporter = asyncio.create_task(report_rows_forever(conductor, self._load.rows))

    async def _build(self, config: ClusterConfig, make_agent: MakeAgent) -> Engine:
        checkpoint = await asyncio.to_thread(open_model, config.model, config.weights)
        runner = await asyncio.to_thread(runner_of, config, checkpoint, self._show, self._phases)
        max_model_len = config.max_model_len or checkpoint.config.max_position_embeddings
        experts = None
        if self._colocated and checkpoint.config.num_experts:
            experts = await asyncio.to_thread(load_experts, config, checkpoint, self._show, self._phases)
            self._copies = start_copies(config, checkpoint, experts)
        self._mesh = ClusterMesh(
            self.member_id,
            attention=True,
            experts=experts,
            copies_port=self._copies.port if self._copies is not None else 0,
            shape=row_shape(config, checkpoint),
            options=MeshOptions.of(config),
            on_trouble=self._on_trouble,
            on_suspect=lambda suspect_id, reason: self._agent.on_suspect(suspect_id, reason),
        )
        self._load = ExpertLoad(self._mesh, experts) if experts is not None else None
        self._link = LinkServer(
            replica_id=self.member_id,
            max_model_len=max_model_len,
            cluster_token=config.network.cluster_token,
            host=config.network.interface,
            max_message_bytes=config.network.max_message_bytes,
        )
        self._telemetry = configure(
            config.telemetry,
            role="attention",
            instance=self.member_id,
            metrics_host=config.network.interface,
            metrics_port=own_metrics_port(config, role_offset=100),
        )
        self._steps = StepTelemetry(self._telemetry)
        spans = RequestSpans(self._telemetry, self._link.publish) if self._telemetry.tracing else None
        warm_up = self._warm_up = WarmUp(spans.publish if spans else self._link.publish)
        engine = Engine(
            runner,
            self._mesh,
            scheduler=config.scheduler,
            publish=warm_up.publish,
            max_model_len=max_model_len,
            attention_parity=checkpoint.config.attention_parity_tokens,
            enable_prefix_cache=config.cache.enable_prefix_cache,
            observer=self._steps,
            grammars=GrammarCompiler.for_checkpoint(checkpoint.folder, runner.vocab_size),
        )
        self._steps.watch(engine.load)
        self._agent = make_agent(self._mesh, self._conductor)
        if experts is not None:
            take_copies(config, checkpoint, self._mesh, experts)
            self._scrubber = start_scrub(config, self._mesh, experts, self._agent)
        self._telemetry.watch(guard_gauges(self._mesh, self._scrubber))
        self._mesh.start(engine.on_header)
        engine.start()
        await self._link.start(spans.around(engine) if spans else engine)
        freeze_heap()
        self._agent.start()
        if compute_device(config).type == "cuda":
            self._warming = asyncio.create_task(self._warm(warm_up, engine, experts, config, max_model_len))
        else:
            self._is_warm = True
        self._phases.log(self.member_id)
        return engine

    async def _warm(
        self,
        warm_up: WarmUp,
        engine: Engine,
        experts: LocalExpertMLP | None,  # of a colocated rank
        config: ClusterConfig,
        max_model_len: int,
    ) -> None:
        """Once the first epoch is in force: what first steps compile and choose, no client waits for."""
        await in_first_epoch(self._mesh)
        try:
            if experts is not None:
                with self._phases.phase("kernels"):
                    await asyncio.to_thread(experts.compile_ahead)
            with self._phases.phase("first tokens"):
                await asyncio.to_thread(warm_up.run, engine, config.scheduler, max_model_len=max_model_len)
            freeze_heap()  # graphs and what else the first steps made
        except Exception:  # a step will meet it too, and say it to whom it concerns
            _log.exception("%s was not warmed up: its first requests will be slow", self.member_id)
        finally:
            self._is_warm = True
        self._phases.log(self.member_id)
        with contextlib.suppress(Unavailable):
            await self._conductor.report(self._status())
        await asyncio.to_thread(warm_up.rest, engine, config.scheduler, max_model_len=max_model_len)

    def check_health(self) -> None:
        if self._engine is not None and self._engine.failure is not None:
            raise self._engine.failure

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's autoscaling policy reads: KV in use or places taken, and the queue."""
        if self._engine is None:
            return {}
        load = self._engine.load()
        pressure = attention_pressure(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_free_kv_blocks=load.num_free_kv_blocks,
            num_kv_blocks=load.num_kv_blocks,
            max_num_seqs=self._max_num_seqs,
        )
        return {"pressure": pressure}

    async def __del__(self) -> None:
        """Drain: finish what runs (Serve's own time-out bounds it), then leave."""
        self._draining = True
        self._reporter.cancel()
        if self._row_reporter is not None:
            self._row_reporter.cancel()
        if self._warm_up is not None:
            self._warm_up.stop()
        if self._warming is not None:
            self._warming.cancel()
        if self._engine is None:
            return
        self._link.drain()
        self._engine.drain()
        await asyncio.to_thread(self._engine.wait_until_idle, DRAIN_S)
        await self._link.stop()
        if self._scrubber is not None:
            await asyncio.to_thread(self._scrubber.stop)
        await asyncio.to_thread(self._agent.drain, LEAVE_S)
        if self._copies is not None:
            self._copies.close()
        await asyncio.to_thread(self._agent.stop)
        await asyncio.to_thread(self._engine.stop)
        self._mesh.close()
        self._telemetry.shutdown()
        with contextlib.suppress(Unavailable):  # it may end together with us
            await self._conductor.forget(self.member_id)

    def _on_trouble(self, epoch: int, error: ExpertMeshError) -> None:
        self._agent.on_trouble(epoch, error)

    def _show(self, progress: LoadProgress) -> None:
        self._detail = str(progress) if progress.bytes_read < progress.bytes_total else ""

    def _status(self) -> ProcessStatus:
        process = ProcessStatus(
            name=self.member_id,
            role=self._role,
            detail=self._detail or str(self._phases),
            pid=os.getpid(),
            node=node_name(),
        )
        if self._engine is None:
            return process
        load, epoch = self._engine.load(), self._mesh.epoch
        expert_load: dict[str, Any] = {}
        if self._load is not None:
            expert_load = self._load.read(self._steps.take_expert_s())
            self._telemetry.record(METRIC_EXPERT_SECONDS, self._load.busy_s)
        return replace(
            process,
            state=state_of(epoch is not None, self._draining),
            address=self._link.address if self._is_warm else "",
            epoch=epoch.number if epoch else 0,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_free_kv_blocks=load.num_free_kv_blocks,
            num_kv_blocks=load.num_kv_blocks,
            num_steps=self._steps.num_steps,
            step_s=self._steps.step_s,
            exchange_s=self._steps.exchange_s,
            faults=faults_of(self._mesh, self._scrubber),
            suspect_spans=self._scrubber.suspect_spans if self._scrubber is not None else (),
            **expert_load,
        )


class StepTelemetry:
    """The engine's observer: metrics and one span a step, and the time spent on own expert rows."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self._expert_s = 0.0
        self.num_steps, self.step_s, self.exchange_s = 0, 0.0, 0.0  # since start

    def watch(self, load: Callable[[], EngineLoad]) -> None:
        """Gauges that Prometheus reads when it asks."""
        self._telemetry.watch(
            [
                Gauge(METRIC_RUNNING, lambda: load().num_running),
                Gauge(METRIC_WAITING, lambda: load().num_waiting),
                Gauge(METRIC_KV_TOTAL, lambda: load().num_kv_blocks),
                Gauge(METRIC_KV_USED, lambda: load().num_kv_blocks - load().num_free_kv_blocks),
            ]
        )

    def take_expert_s(self) -> float:
        """Seconds spent computing own expert rows since the last call."""
        spent, self._expert_s = self._expert_s, 0.0
        return spent

    def observe(self, stats: StepStats) -> None:
        self._expert_s += stats.expert_s
        self.num_steps += 1
        self.exchange_s += stats.exchange_s
        self.step_s += stats.schedule_s + stats.forward_s + stats.exchange_s + stats.expert_s + stats.sample_s
        self.step_s += stats.publish_s
        telemetry = self._telemetry
        if telemetry.metering:
            phases = {
                "schedule": stats.schedule_s,
                "forward": stats.forward_s,
                "exchange": stats.exchange_s,
                "expert": stats.expert_s,
                "sample": stats.sample_s,
                "publish": stats.publish_s,
            }
            for phase, seconds in phases.items():
                telemetry.record(METRIC_STEP, seconds, phase=phase)
            telemetry.record(METRIC_STEP_TOKENS, stats.num_decode_tokens, kind="decode")
            telemetry.record(METRIC_STEP_TOKENS, stats.num_prefill_tokens, kind="prefill")
        if telemetry.tracing:
            first, *others = stats.request_traceparents or ("",)
            attributes = {
                ATTR_STEP_ID: stats.header.step_id,
                ATTR_EPOCH: stats.header.epoch,
                ATTR_NUM_TOKENS: stats.num_decode_tokens + stats.num_prefill_tokens,
            }
            telemetry.start(SPAN_STEP, first, attributes, others, started_at=stats.started_at).end(stats.error)


def runner_of(
    config: ClusterConfig, checkpoint: Checkpoint, progress: ProgressCallback, phases: StartupPhases
) -> StepRunner:
    """This tier's weights and KV pool."""
    colocated = config.layout == "colocated"
    return load_runner(
        checkpoint,
        config.cache,
        config.scheduler,
        device=compute_device(config),
        dtype=compute_dtype(config, checkpoint),
        max_model_len=config.max_model_len or checkpoint.config.max_position_embeddings,
        batch_invariant=is_batch_invariant(config),
        expert_bytes=expert_bytes_of_rank(config, checkpoint) if colocated else 0,
        progress=progress,
        phases=phases,
    )
