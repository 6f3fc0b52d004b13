"""Members of a mesh as real processes for test_mesh.py: toy layers, tiny deterministic experts, commands by pipe."""

import asyncio
import collections
import os
import pickle
import queue
import random
import signal
import sys
import threading
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from exchange_worlds import device_of
from process_world import PATIENCE_S

from expertmesh.bench.flipping_wire import Flip, FlippingMesh
from expertmesh.cluster.member_agent import MemberAgent
from expertmesh.config import ExchangeConfig
from expertmesh.errors import ExpertMeshError, GuardError, Unavailable
from expertmesh.router.device_exchange import DeviceExchange, LocalDeviceExchange
from expertmesh.router.device_step import DeviceStep
from expertmesh.router.epoch import Epoch, Member, StepHeader
from expertmesh.router.exchange import RowShape
from expertmesh.router.exchange_nccl import NcclExchange
from expertmesh.router.group import abort_gloo
from expertmesh.router.guard import BadRow
from expertmesh.router.mesh import ClusterMesh, MeshOptions
from expertmesh.router.placement import Placement, uniform

NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN = 5, 16, 4, 32
LAYERS = (1, 2, 4)
SHAPE = RowShape(hidden_size=HIDDEN, top_k=TOP_K, dtype=torch.float32)
CPU = torch.device("cpu")
TOKEN = "shared secret"
OUTPUT_S = PATIENCE_S / 2  # until an output must have come


class TinyExperts:
    """Each logical expert of a layer is one seeded matrix; a row's product is computed by itself, so its bits depend on
    nothing else."""

    def __init__(self) -> None:
        self.resident: dict[int, dict[int, torch.Tensor]] = {}  # version -> layer -> [slots, hidden, hidden]
        self.version = 0
        self.broken = False  # the next product fails

    def set_placement(self, placement: Placement, ep_rank: int) -> None:
        if placement.version not in self.resident:
            self.resident[placement.version] = {
                layer_id: torch.stack([matrix(layer_id, e) for e in placement.local_slots(layer_id, ep_rank).tolist()])
                for layer_id in placement.moe_layers
            }
        self.version = self.version or placement.version

    def use_placement(self, version: int) -> None:
        self.version = version
        self.resident = {v: layers for v, layers in self.resident.items() if v >= version}

    def forward(self, layer_id: int, rows: torch.Tensor, slot_ids: torch.Tensor) -> torch.Tensor:
        if self.broken:
            self.broken = False
            raise RuntimeError("a broken expert")
        row, k = (slot_ids >= 0).nonzero(as_tuple=True)
        weights = self.resident[self.version][layer_id]
        products = [weights[slot_ids[r, j]] @ rows[r] for r, j in zip(row.tolist(), k.tolist(), strict=True)]
        return torch.stack(products) if products else rows[:0]


class DeviceTinyExperts(TinyExperts):
    """The same on a GPU, as its kernels are: all pairs at once, no host sync, at addresses that a graph may hold."""

    capturable, graph_version = True, 0

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        empty = torch.zeros(NUM_EXPERTS * 2, HIDDEN, HIDDEN, device=device)
        self.used = {layer_id: empty.clone() for layer_id in LAYERS}  # [slots, hidden, hidden]
        self.rows = torch.zeros(NUM_LAYERS, NUM_EXPERTS * 2 + 1, dtype=torch.int64, device=device)  # the last one: -1

    def set_placement(self, placement: Placement, ep_rank: int) -> None:
        is_first = not self.version
        super().set_placement(placement, ep_rank)
        if is_first:
            self.use_placement(self.version)

    def use_placement(self, version: int) -> None:
        super().use_placement(version)
        self.rows.zero_()
        for layer_id, weights in self.resident[version].items():
            self.used[layer_id][: len(weights)].copy_(weights)

    def rows_per_slot(self, version: int) -> npt.NDArray[np.int64]:
        num_slots = len(self.resident[version][LAYERS[0]])
        return self.rows.cpu().numpy()[:, :num_slots]

    def forward(self, layer_id: int, rows: torch.Tensor, slot_ids: torch.Tensor) -> torch.Tensor:
        if self.broken:
            self.broken = False
            raise RuntimeError("a broken expert")
        slots = slot_ids.flatten().long()
        slots = torch.where(slots < 0, self.rows.shape[1] - 1, slots)
        self.rows[layer_id].index_add_(0, slots, torch.ones_like(slots))
        weights = self.used[layer_id][slot_ids.clamp(min=0).long()]  # [R, top_k, hidden, hidden]
        return (weights * rows[:, None, None, :]).sum(-1)


def matrix(layer_id: int, expert: int) -> torch.Tensor:
    """[hidden, hidden]; an empty slot (-1) holds NaN: it must never be asked."""
    if expert < 0:
        return torch.full((HIDDEN, HIDDEN), float("nan"))
    generator = torch.Generator().manual_seed(1000 * layer_id + expert)
    return torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5


def toy_model(step: Any, batch_id: int, num_tokens: int, device: torch.device = CPU) -> torch.Tensor:
    """[num_tokens, hidden]: seeded input through every MoE layer, with seeded routing."""
    generator = torch.Generator().manual_seed(batch_id)
    x = torch.randn(num_tokens, HIDDEN, generator=generator)
    x = x.to(device)
    for layer_id in LAYERS:
        ids = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(1)[:, :TOP_K].to(torch.int32)
        weights = torch.rand(num_tokens, TOP_K, generator=generator)
        x = x + step.moe(layer_id, x, ids.to(device), weights.to(device))
    if isinstance(step, DeviceStep):
        if device != CPU:
            event = torch.cuda.Event()
            event.record()
            step.wait(event)
        step.finish()
    return x.cpu()


def placement(ep_size: int, version: int) -> Placement:
    """Version 1 is plain; later ones shuffle the experts over the ranks and add copies."""
    plain = uniform(NUM_LAYERS, NUM_EXPERTS, ep_size, moe_layers=LAYERS)
    if version == 1:
        return plain
    generator = torch.Generator().manual_seed(version)
    extra = NUM_EXPERTS // 2
    table = torch.full((NUM_LAYERS, NUM_EXPERTS + extra), -1, dtype=torch.int32)
    for layer_id in LAYERS:
        copies = torch.randperm(NUM_EXPERTS, generator=generator)[:extra]
        row = torch.cat([torch.arange(NUM_EXPERTS), copies])
        table[layer_id] = row[torch.randperm(len(row), generator=generator)].to(torch.int32)
    return Placement(version, NUM_EXPERTS, ep_size, table)


def experts_on(device: torch.device, mesh_type: type[ClusterMesh]) -> TinyExperts:
    on_host = device == CPU and mesh_type is not DeviceStepsOverGloo
    return TinyExperts() if on_host else DeviceTinyExperts(device)


class MemberProcess:
    """One member: the main thread obeys (method, args) from the test's pipe, as an agent would; the engine thread runs
    the steps that headers name."""

    def __init__(
        self,
        rank: int,
        connection: Connection,
        roles: str,
        exchange: ExchangeConfig,
        name: str = "member",
        mesh_type: type[ClusterMesh] = ClusterMesh,
        device: torch.device = CPU,
    ) -> None:
        self.connection, self.device = connection, device
        self.headers = queue.SimpleQueue[StepHeader | str]()  # or "end", or "work": look for batches
        self.bid_is_out = False  # engine thread
        self.outputs = queue.SimpleQueue[tuple[int, Any, int] | str]()  # (batch id, output or error, epoch); its end
        self.batches = collections.deque[tuple[int, int]]()  # (batch id, tokens)
        self.troubles: list[str] = []
        self.steps_served: collections.Counter[int] = collections.Counter()  # by epoch
        self.dies = False
        self.seen: list[tuple[int, BadRow]] = []  # (step id, what its guard named)
        role = roles[rank]
        self.mesh = mesh_type(
            f"{name}{rank}#0",
            attention=role in "ab",
            experts=None if role == "a" else experts_on(device, mesh_type),
            shape=replace(SHAPE, device=device),
            options=MeshOptions(cluster_token=TOKEN, exchange=exchange, buckets=(1, 2, 4) if device != CPU else ()),
            on_trouble=lambda epoch, error: self.troubles.append(type(error).__name__),
        )
        self.mesh.start(self.headers.put)
        self.engine = threading.Thread(target=self._engine)
        self.engine.start()

    def run(self) -> None:
        while True:
            method, args = self.connection.recv()
            if method == "end":
                break
            try:
                answer = getattr(self, method)(*args)
            except ExpertMeshError as error:
                answer = str(error)
            self.connection.send(("value", answer))
        self.headers.put("end")
        self.engine.join()
        self.mesh.close()

    def member(self) -> Member:
        return self.mesh.member

    def prepare(self, epoch: Epoch) -> None:
        self.mesh.prepare(epoch)

    def commit(self, number: int) -> None:
        self.mesh.commit(number)

    def rollback(self, number: int) -> None:
        self.mesh.rollback(number)

    def submit(self, batches: list[tuple[int, int]]) -> None:
        self.batches.extend(batches)
        self.headers.put("work")

    def collect(self, count: int) -> list[tuple[int, Any, int]]:
        return [self._output() for _ in range(count)]

    def _output(self) -> tuple[int, Any, int]:
        try:
            output = self.outputs.get(timeout=OUTPUT_S)
        except queue.Empty:
            stack = "".join(traceback.format_stack(sys._current_frames()[self.engine.ident or 0]))
            raise TimeoutError(
                f"no output within {OUTPUT_S} s; troubles {self.troubles}; the engine:\n{stack}"
            ) from None
        if isinstance(output, str):
            raise RuntimeError(output)
        return output

    def die_in_next_step(self) -> None:
        self.dies = True

    def break_experts(self) -> None:
        self.mesh._experts.broken = True

    def report(self) -> tuple[dict[int, int], list[str], int, int]:
        """(steps by epoch, troubles, placement version, rows computed under it)."""
        version, rows = self.mesh.load()
        return dict(self.steps_served), self.troubles, version, int(rows.sum())

    def guarded(self) -> list[tuple[int, BadRow]]:
        return self.seen

    def flips(self) -> list[Flip]:
        return self.mesh.wire.flips

    def _engine(self) -> None:
        try:
            self._take_headers()
        except BaseException:
            self.outputs.put(f"the engine's thread failed:\n{traceback.format_exc()}")
            raise

    def _take_headers(self) -> None:
        if self.device != CPU:
            torch.cuda.set_device(self.device)
        while (header := self.headers.get()) != "end":
            if isinstance(header, StepHeader):
                self._step(header)
            if self.batches and not self.bid_is_out:
                self.bid_is_out = True
                self.mesh.bid(self.batches[0][1], 0)

    def _step(self, header: StepHeader) -> None:
        batch = None
        try:
            step = self.mesh.enter(header)
            if self.dies:
                os.kill(os.getpid(), signal.SIGKILL)
            if header.num_tokens[self.mesh.rank]:
                self.bid_is_out = False
                batch = self.batches.popleft()
                self.outputs.put((batch[0], toy_model(step, *batch, self.device), header.epoch))
            else:
                step.serve()
            self.steps_served[header.epoch] += 1
        except (ExpertMeshError, RuntimeError) as error:
            if batch is not None:  # as an engine does: the same batch runs again
                self.batches.appendleft(batch)
            if isinstance(error, GuardError):
                self.seen += [(error.step_id, row) for row in error.bad]
            self.outputs.put((batch[0] if batch else -1, f"{type(error).__name__}: {error}", header.epoch))


def member_process(rank: int, connection: Connection, roles: str, exchange: ExchangeConfig) -> None:
    MemberProcess(rank, connection, roles, exchange).run()


class GlooInPlace:
    """What the exchange asks of NCCL's communicator."""

    def __init__(self, group: Any) -> None:
        self.alltoall_base, self.group = group.alltoall_base, group

    def abort(self) -> None:
        abort_gloo(self.group)


class DeviceStepsOverGloo(ClusterMesh):
    """Device steps without a device: the NCCL exchange's two forms over gloo, in turns of at most 4 tokens. Every rank
    must take part in every step: gloo has no grouped sends between some."""

    def _build_exchange(self, epoch: Epoch, rank: int) -> DeviceExchange:
        if len(epoch.members) == 1:
            return LocalDeviceExchange(CPU)
        options = self._options.exchange
        return NcclExchange(
            GlooInPlace(self._build_group(epoch, rank)),  # type: ignore[arg-type]
            epoch,
            rank,
            self._shape,
            capacity=4,
            exact_above=2,
            timeout_base_s=options.timeout_base_s,
            timeout_per_row_s=0.0,
        )


def device_process(rank: int, connection: Connection, roles: str, exchange: ExchangeConfig) -> None:
    """A member with device steps on the CPU."""
    MemberProcess(rank, connection, roles, exchange, mesh_type=DeviceStepsOverGloo).run()


def gpu_process(rank: int, connection: Connection, roles: str, exchange: ExchangeConfig, num_gpus: int) -> None:
    """A member whose rows live on a GPU, the only one that it sees."""
    device = device_of(rank, num_gpus)
    MemberProcess(rank, connection, roles, exchange, device=device).run()


def flipping_process(rank: int, connection: Connection, roles: str, exchange: ExchangeConfig, rate: float) -> None:
    """A member on a wire that turns bits over in so large a part of its messages."""
    process = MemberProcess(rank, connection, roles, exchange, mesh_type=FlippingMesh)
    process.mesh.rate, process.mesh.generator = rate, random.Random(rank)
    process.run()


class CallByTcp:
    """A `member_agent.ConductorClient` for tests: one pickled call a connection, to the parent's loopback server."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def join(self, event: Any) -> None:
        await self._call("join", event)

    async def tell(self, event: Any) -> None:
        await self._call("tell", event)

    async def next_commands(self, member_id: str, after: int, timeout_s: float) -> Any:
        return await self._call("next_commands", member_id, after, timeout_s)

    async def _call(self, *call: Any) -> Any:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(pickle.dumps(call))
            writer.write_eof()
            answer = pickle.loads(await reader.read())
            writer.close()
        except (OSError, EOFError) as error:
            raise Unavailable(str(error)) from error
        return answer


def agent_process(
    rank: int,
    connection: Connection,
    roles: str,
    exchange: ExchangeConfig,
    port: int,
    name: str,
    flipping_rank: int = -1,
) -> None:
    """A member that follows a Conductor by itself; what one of them sends loses a bit in every third message."""
    mesh_type = FlippingMesh if rank == flipping_rank else ClusterMesh
    process = MemberProcess(rank, connection, roles, exchange, name, mesh_type)
    if isinstance(process.mesh, FlippingMesh):
        process.mesh.rate, process.mesh.generator = 1 / 3, random.Random(rank)
    agent = MemberAgent(process.mesh, CallByTcp(port))
    process.mesh._on_trouble = agent.on_trouble
    process.mesh.guard._on_suspect = agent.on_suspect
    agent.start()
    process.run()
    agent.stop()
