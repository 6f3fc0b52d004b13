"""The Serve deployment of one expert shard: a member of the mesh that owns experts and sends no tokens.

Its event loop only joins, reports and answers health checks. One serving thread takes every step that a header names:
enter, serve all MoE layers' turns, wait for the next header in a blocking read. Which experts it holds is the
placement's business: they are loaded when an epoch is prepared, before it is entered. Serve never sends it a request;
what Serve needs for scaling is reported with `record_autoscaling_stats`."""

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Callable
from typing import Protocol

import psutil
import ray
import torch
from ray import serve

from ..checkpoint import Checkpoint, LoadProgress
from ..config import ClusterConfig
from ..errors import ExpertMeshError, KernelError, ReplicaLost, Unavailable
from ..model_source import open_model
from ..numerics import select_numerics
from ..router.exchange import RowShape
from ..router.group import use_batch_scheduling
from ..router.heap import freeze_heap
from ..router.mesh import ClusterMesh, MeshOptions
from ..router.status import (
    ConductorLink,
    ProcessStatus,
    report_failure,
    report_forever,
    report_rows_forever,
)
from ..startup_phases import StartupPhases
from ..telemetry import (
    METRIC_BAD_ROWS,
    METRIC_EPOCH,
    METRIC_EXPERT_ROWS,
    METRIC_EXPERT_SECONDS,
    METRIC_PLACEMENT,
    METRIC_SCRUB_ROUND,
    METRIC_STEP_REPLAYS,
    METRIC_WEIGHT_FAULTS,
    Gauge,
    configure,
)
from .copies import CopyLayout, CopyServer, PeerCopies
from .device_experts import NUM_SPARE
from .expert_load import ExpertLoad
from .mlp import LocalExpertMLP
from .scrub import Scrubber, WeightFault
from .step_server import StepServer
from .weights import expert_bytes_on_disk, expert_shapes, least_shards

LOOK_S = 0.05  # between looks at whether the first epoch is in force
RETIRED_LOOK_S = 0.5
LEAVE_S = 25.0  # in good order: an epoch without this member; below Serve's graceful_shutdown_timeout_s
_log = logging.getLogger(__name__)


class Agent(Protocol):
    """Follows the Conductor's commands for one mesh (`cluster/member_agent.py`)."""

    def start(self) -> None: ...

    @property
    def retired(self) -> bool: ...

    def drain(self, timeout_s: float) -> bool: ...

    def stop(self) -> None: ...

    def on_trouble(self, epoch: int, error: ExpertMeshError) -> None: ...

    def on_suspect(self, suspect_id: str, reason: str) -> None: ...


MakeAgent = Callable[[ClusterMesh, ConductorLink], Agent]


class ExpertShard:
    """One shard. `__init__` returns when it has asked to join; it is READY when its epoch is committed."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config_text: str, conductor: ConductorLink, make_agent: MakeAgent
    ) -> None:
        config = config_here(config_text)
        self.member_id, self._conductor = replica_name("expert"), conductor
        self._detail, self._draining, self._phases = "", False, StartupPhases()
        self._last = ProcessStatus(name=self.member_id, role="expert")
        self._server: StepServer | None = None
        self._fits = 1
        settle_on_cpu()
        try:
            self._server = await self._build(config, make_agent)
        except Exception as error:
            await report_failure(conductor, self.member_id, error)
            raise
        self._reporters = [
            asyncio.create_task(report_forever(conductor, self._status)),
            asyncio.create_task(report_rows_forever(conductor, self._load.rows)),
            asyncio.create_task(self._compile_ahead()),
        ]
        self._ender = asyncio.create_task(self._end_when_retired())

    async def _build(self, config: ClusterConfig, make_agent: MakeAgent) -> "StepServer":
        checkpoint = await asyncio.to_thread(open_model, config.model, config.weights)
        self._experts = await asyncio.to_thread(load_experts, config, checkpoint, self._show, self._phases)
        on_gpu = compute_device(config).type == "cuda"
        self._fits = least_shards(checkpoint, memory_of(config), dtype=None if on_gpu else self._experts.dtype)
        self._copies = start_copies(config, checkpoint, self._experts)
        self._mesh = ClusterMesh(
            self.member_id,
            attention=False,
            experts=self._experts,
            copies_port=self._copies.port,
            shape=row_shape(config, checkpoint),
            options=MeshOptions.of(config),
            on_trouble=lambda number, error: self._agent.on_trouble(number, error),
        )
        take_copies(config, checkpoint, self._mesh, self._experts)
        self._agent = make_agent(self._mesh, self._conductor)
        self._load = ExpertLoad(self._mesh, self._experts)
        self._scrubber = start_scrub(config, self._mesh, self._experts, self._agent)
        self._telemetry = configure(
            config.telemetry,
            role="expert",
            instance=self.member_id,
            metrics_host=config.network.interface,
            metrics_port=own_metrics_port(config, role_offset=200),
        )
        self._telemetry.watch(
            [
                Gauge(METRIC_EXPERT_ROWS, lambda: self._last.num_rows),
                Gauge(METRIC_EPOCH, lambda: self._last.epoch),
                Gauge(METRIC_PLACEMENT, lambda: self._mesh.load()[0]),
                *guard_gauges(self._mesh, self._scrubber),
            ]
        )
        server = StepServer(self._mesh, self._telemetry)
        freeze_heap()
        server.start()
        self._agent.start()
        return server

    async def _compile_ahead(self) -> None:
        """Beside the first steps: those that need another plan of the product do not wait for it."""
        await in_first_epoch(self._mesh)
        try:
            with self._phases.phase("kernels"):
                await asyncio.to_thread(self._experts.compile_ahead)
        except KernelError as error:  # the step that needs it will meet it too
            _log.warning("%s: a kernel does not compile: %s", self.member_id, error)

    def check_health(self) -> None:
        if self._server is not None and self._server.failure is not None:
            raise self._server.failure
        if self._server is not None and self._agent.retired and not self._draining:
            raise ReplicaLost("this shard was drained and serves nothing: another one starts in its place")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve's autoscaling policy reads: part of the time spent computing rows, rows so far, and how few shards
        like this one hold every expert."""
        last = self._last
        return {"busy_fraction": last.busy_fraction, "num_rows": float(last.num_rows), "fits": float(self._fits)}

    async def _end_when_retired(self) -> None:
        """Drained by somebody else than Serve: Serve sees the end of a process at its next look, a failed check of
        health only when it has come three times."""
        while not self._agent.retired:  # noqa: ASYNC110  (another thread's flag)
            await asyncio.sleep(RETIRED_LOOK_S)
        if not self._draining:
            try:
                await self._close()
            finally:
                ray.kill(ray.get_runtime_context().current_actor)

    async def __del__(self) -> None:
        if self._server is not None and not self._draining:
            self._ender.cancel()
            await self._close()

    async def _close(self) -> None:
        assert self._server is not None
        self._draining = True
        for reporter in self._reporters:
            reporter.cancel()
        await asyncio.to_thread(self._scrubber.stop)
        await asyncio.to_thread(self._agent.drain, LEAVE_S)
        self._copies.close()
        await asyncio.to_thread(self._agent.stop)
        await asyncio.to_thread(self._server.stop)
        self._mesh.close()
        self._telemetry.shutdown()
        with contextlib.suppress(Unavailable):  # it may end together with us
            await self._conductor.forget(self.member_id)

    def _show(self, progress: LoadProgress) -> None:
        self._detail = str(progress) if progress.bytes_read < progress.bytes_total else ""

    def _status(self) -> ProcessStatus:
        assert self._server is not None
        epoch, load = self._mesh.epoch, self._load.read(self._server.take_busy_s())
        self._telemetry.record(METRIC_EXPERT_SECONDS, self._load.busy_s)
        self._last = ProcessStatus(
            name=self.member_id,
            role="expert",
            state=state_of(epoch is not None, self._draining),
            detail=self._detail or str(self._phases),
            pid=os.getpid(),
            node=node_name(),
            epoch=epoch.number if epoch else 0,
            faults=faults_of(self._mesh, self._scrubber),
            suspect_spans=self._scrubber.suspect_spans,
            **load,
        )
        return self._last


# ---------------------------------------------------------------- shared with cluster/replica.py


def config_here(config_text: str) -> ClusterConfig:
    """The cluster's configuration as it is on this host."""
    return ClusterConfig.from_json(config_text).on_node(ray.util.get_node_ip_address())


def load_experts(
    config: ClusterConfig,
    checkpoint: Checkpoint,
    progress: Callable[[LoadProgress], None],
    phases: StartupPhases | None = None,
) -> LocalExpertMLP:
    """The expert product of this process; its weights come with the first placement."""
    device, dtype = compute_device(config), compute_dtype(config, checkpoint)
    shapes = expert_shapes(checkpoint.config)
    numerics = select_numerics(
        batch_invariant=is_batch_invariant(config), linear_shapes=shapes, batched_shapes=shapes, device=device
    )
    return LocalExpertMLP(checkpoint, numerics, dtype=dtype, device=device, progress=progress, phases=phases)


async def in_first_epoch(mesh: ClusterMesh) -> None:
    """Returns when the first epoch is in force here: experts are resident and in use."""
    while mesh.epoch is None:  # noqa: ASYNC110  (looked at at the start alone)
        await asyncio.sleep(LOOK_S)


def start_copies(config: ClusterConfig, checkpoint: Checkpoint, experts: LocalExpertMLP) -> CopyServer:
    """Gives other members what is resident here."""
    layout, network = CopyLayout.of(checkpoint, experts.dtype), config.network
    return CopyServer(experts, layout, interface=network.interface, cluster_token=network.cluster_token)


def take_copies(config: ClusterConfig, checkpoint: Checkpoint, mesh: ClusterMesh, experts: LocalExpertMLP) -> None:
    """From now on experts come from other members' memory where they are there."""
    layout, network = CopyLayout.of(checkpoint, experts.dtype), config.network
    name, interface, token = mesh.member.member_id, network.interface, network.cluster_token
    experts.take_from(PeerCopies(name, layout, mesh.peers, interface=interface, cluster_token=token))


def start_scrub(config: ClusterConfig, mesh: ClusterMesh, experts: LocalExpertMLP, agent: Agent) -> Scrubber:
    """The background check of this process's experts; what cannot be repaired makes it leave."""

    def on_fault(fault: WeightFault) -> None:
        if not fault.repaired_from:
            agent.on_suspect(mesh.member.member_id, str(fault))

    scrub = config.scrub
    scrubber = Scrubber(
        experts, count_rows=mesh.load, period_s=scrub.period_s, max_share=scrub.max_share, on_fault=on_fault
    )
    mesh.guard.heal = scrubber.check_layer
    if scrub.period_s:
        scrubber.start()
    return scrubber


def faults_of(mesh: ClusterMesh, scrubber: Scrubber | None) -> str:
    """For this process's report."""
    return "; ".join(text for text in (mesh.guard.summary, scrubber.summary if scrubber else "") if text)


def guard_gauges(mesh: ClusterMesh, scrubber: Scrubber | None) -> list[Gauge]:
    gauges = [
        Gauge(METRIC_BAD_ROWS, lambda: mesh.guard.num_bad_rows),
        Gauge(METRIC_STEP_REPLAYS, lambda: mesh.guard.num_replays),
    ]
    if scrubber is not None:
        gauges.append(Gauge(METRIC_WEIGHT_FAULTS, lambda: scrubber.num_faults))
        gauges.append(Gauge(METRIC_SCRUB_ROUND, lambda: scrubber.round_s))
    return gauges


def row_shape(config: ClusterConfig, checkpoint: Checkpoint) -> RowShape:
    model = checkpoint.config
    return RowShape(
        hidden_size=model.hidden_size,
        top_k=model.top_k,
        dtype=compute_dtype(config, checkpoint),
        device=compute_device(config),
    )


def memory_of(config: ClusterConfig) -> int:
    """Bytes of what this process computes on: its GPU's, or the host's."""
    device = compute_device(config)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def compute_device(config: ClusterConfig) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise KernelError(
            f"device=cuda, but torch {torch.__version__} sees no GPU in this process (CUDA_VISIBLE_DEVICES: {shown}); "
            "install a CUDA build of torch and a driver on this host, or say device=cpu"
        )
    return torch.device(config.device)


def compute_dtype(config: ClusterConfig, checkpoint: Checkpoint) -> torch.dtype:
    """auto: float32 on a CPU, the checkpoint's own type on a GPU."""
    name: str = config.dtype
    if name == "auto":
        name = checkpoint.config.dtype if compute_device(config).type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def expert_bytes_of_rank(config: ClusterConfig, checkpoint: Checkpoint) -> int:
    """What the experts of one rank take, the free places beside them included."""
    model = checkpoint.config
    slots = -(-(model.num_experts + config.num_redundant_experts) // config.num_expert_ranks)
    return sum((slots + NUM_SPARE) * expert_bytes_on_disk(checkpoint, layer_id) for layer_id in model.moe_layer_ids)


def is_batch_invariant(config: ClusterConfig) -> bool:
    return compute_device(config).type == "cpu" if config.batch_invariant is None else config.batch_invariant


def settle_on_cpu() -> None:
    """One torch thread, so that a row's bits don't change with the batch and ranks don't fight for cores."""
    torch.set_num_threads(1)
    use_batch_scheduling()


def replica_name(role: str) -> str:
    """The process's identity: Serve's replica tag and an incarnation. Never Serve's rank, which is used again."""
    return f"{role}-{serve.get_replica_context().replica_tag}#{secrets.token_hex(2)}"


def node_name() -> str:
    return os.uname().nodename


def state_of(in_epoch: bool, draining: bool) -> str:
    if draining:
        return "draining"
    return "ready" if in_epoch else "joining"


def own_metrics_port(config: ClusterConfig, *, role_offset: int) -> int:
    """-1 off, 0 a free one; else the configured port + 100 (attention) or 200 (experts) + place on this host."""
    port = config.network.metrics_port
    if port <= 0:
        return port
    return port + role_offset + serve.get_replica_context().rank.local_rank
