"""A cluster without Ray: members as processes, each with its device, that follow a real membership core by real agents.

The parent is Conductor and client: it hosts the core (`cluster/membership_host.py`), answers the agents' calls over
pipes, submits requests to members' engines and gets their tokens as they come. Members may be killed, started and
drained while streams run. Models are cases of noise (`step_cases.py`), greedy, so what streams say can be compared."""

import asyncio
import contextlib
import faulthandler
import multiprocessing
import os
import secrets
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch

from ..cluster.member_agent import MemberAgent
from ..cluster.membership import Membership, Place
from ..cluster.membership_host import MembershipHost
from ..cluster.membership_messages import Command, Event, Join, Lost
from ..config import CacheConfig, ExchangeConfig, SchedulerConfig
from ..errors import Unavailable
from ..experts.mlp import LocalExpertMLP
from ..experts.step_server import StepServer
from ..request import EngineRequest, FinishReason, RequestOutput
from ..router.exchange import RowShape
from ..router.mesh import ClusterMesh, MeshOptions
from ..telemetry import Telemetry
from .local_engine import LocalEngine
from .step_cases import open_case

_context = multiprocessing.get_context("spawn")


@dataclass(frozen=True, kw_only=True)
class WorldOptions:
    """What all members of a world share."""

    case: str = "30b"
    num_layers: int = 8
    device: str = "cuda"
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    kv_memory_bytes: int = 4 << 30
    batch_invariant: bool = False
    mesh_type: type[ClusterMesh] = ClusterMesh
    isolated: bool = True  # each process sees its own GPU alone, as Ray has it
    max_model_len: int = 4096
    patience_s: float = 120.0  # of every wait; a start may take twice as long
    enable_prefix_cache: bool = False


@dataclass
class Watched:
    """One stream as the client has it, wherever it runs."""

    request: EngineRequest
    member: str
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    num_cached_tokens: int = 0
    end: str = ""


class MemberWorld:
    """Use as a context manager."""

    def __init__(self, options: WorldOptions, *, num_attention: int, num_expert: int, place: Place) -> None:
        self.options = options
        self.members: dict[str, _Child] = {}
        self.streams: dict[str, Watched] = {}
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="conductor", daemon=True)
        self._thread.start()
        self._core = Membership(
            num_attention=num_attention,
            num_expert=num_expert,
            place=place,
            make_key=lambda: secrets.token_hex(8),
            prepare_timeout_s=120.0,
        )
        self._host = self._call(_make_host, self._core)

    def __enter__(self) -> "MemberWorld":
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end)
        self._thread.join()
        for child in self.members.values():
            child.process.kill()

    def _end(self) -> None:
        """On the loop; else it would place experts anew for whoever is left, while this process ends."""
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.call_soon(self._loop.stop)

    def start(self, name: str, role: str, gpu: int) -> "_Child":
        """`role`: attention, expert or colocated; joins when it has loaded."""
        ours, theirs = _context.Pipe()
        process = _context.Process(target=_member, args=(theirs, name, role, gpu, self.options), daemon=True)
        process.start()
        theirs.close()
        child = self.members[name] = _Child(process, ours)
        threading.Thread(target=self._listen, args=(name, child), daemon=True).start()
        return child

    def kill(self, name: str) -> float:
        """SIGKILL now; the operating system's word reaches the Conductor as Ray's would."""
        pid = self.members[name].process.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        return perf_counter()

    def drain(self, name: str, timeout_s: float = 30.0) -> bool:
        """The member leaves in good order."""
        return bool(self.members[name].ask(("drain", timeout_s), timeout_s + 10))

    def ask(self, name: str, what: str) -> Any:
        return self.members[name].ask((what, None), 60.0)

    def submit(self, name: str, requests: Sequence[EngineRequest]) -> list[Watched]:
        streams = []
        for request in requests:
            known = self.streams.get(request.request_id)
            stream = known or Watched(request, name)
            stream.member = name
            self.streams[request.request_id] = stream
            streams.append(stream)
        self.members[name].send(("submit", list(requests)))
        return streams

    def move(self, streams: Sequence[Watched], name: str) -> None:
        """Their member is gone: they go on elsewhere with the tokens that they have, as a gateway does it."""
        self.submit(name, [_going_on(stream) for stream in streams])

    def wait(self, streams: Sequence[Watched], timeout_s: float | None = None) -> None:
        self.wait_for(lambda: all(stream.end for stream in streams), timeout_s)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float | None = None) -> None:
        timeout_s = timeout_s or self.options.patience_s
        with self._changed:
            if not self._changed.wait_for(condition, timeout_s):
                raise TimeoutError(f"not within {timeout_s} s; {self._what_is_wrong()}")

    def wait_for_epoch(self, members: Sequence[str]) -> int:
        """Until an epoch of exactly these is in force, on the Conductor's word; its number."""
        timeout_s = 2 * self.options.patience_s
        wanted, deadline = {f"{name}#0" for name in members}, perf_counter() + timeout_s
        while perf_counter() < deadline:
            epoch = self._core.epoch
            if epoch is not None and {m.member_id for m in epoch.members} == wanted and self._core.ready:
                return epoch.number
            if error := next((c.error for c in self.members.values() if c.error and c.process.is_alive()), ""):
                raise RuntimeError(error)
            sleep(0.001)
        raise TimeoutError(f"no epoch of {sorted(wanted)} within {timeout_s} s; {self._what_is_wrong()}")

    def _what_is_wrong(self) -> str:
        """The members' own words; where their threads stand goes to the standard error."""
        for child in self.members.values():
            if child.process.is_alive():
                os.kill(child.process.pid, signal.SIGUSR1)
        sleep(0.5)
        errors = {name: child.error for name, child in self.members.items() if child.error}
        return f"{self._core.last_failure}; members' errors: {errors}"

    def _listen(self, name: str, child: "_Child") -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                kind, value = child.connection.recv()
                now = perf_counter()
                if kind == "outputs":
                    with self._changed:
                        for output in value:
                            self._take(name, output, now)
                        self._changed.notify_all()
                elif kind == "conductor":
                    self._loop.call_soon_threadsafe(self._answer, child, *value)
                elif kind == "error":
                    child.error = value
                else:
                    child.answers.set_result(value)
        self._loop.call_soon_threadsafe(self._host.take, Lost(f"{name}#0"))  # as Ray's notice

    def _take(self, name: str, output: RequestOutput, now: float) -> None:
        stream = self.streams[output.request_id]
        if stream.member == name and not stream.end:
            stream.token_ids += output.token_ids
            stream.times_s += [now] * len(output.token_ids)
            stream.num_cached_tokens = max(stream.num_cached_tokens, output.num_cached_tokens)
            if output.finish_reason is not FinishReason.NONE:
                stream.end = output.error_message or output.finish_reason.name

    def _answer(self, child: "_Child", number: int, method: str, arguments: tuple[Any, ...]) -> None:
        async def call() -> None:
            answer = await getattr(self._host, method)(*arguments)
            with contextlib.suppress(OSError):
                child.send(("conductor", (number, answer)))

        task = self._loop.create_task(call())
        child.tasks.add(task)
        task.add_done_callback(child.tasks.discard)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        async def call() -> Any:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result()


def _make_host(core: Membership) -> MembershipHost:
    return MembershipHost(core)


def _going_on(stream: Watched) -> EngineRequest:
    request = stream.request
    return EngineRequest(
        request_id=request.request_id,
        prompt_ids=request.prompt_ids,
        sampling=request.sampling,
        output_ids=tuple(stream.token_ids),
    )


class _Child:
    """The parent's end of one member."""

    def __init__(self, process: Any, connection: Connection) -> None:
        self.process, self.connection = process, connection
        self.error = ""
        self.answers: Future[Any] = Future()
        self.tasks: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()

    def send(self, message: tuple[str, Any]) -> None:
        with self._lock:
            self.connection.send(message)

    def ask(self, message: tuple[str, Any], timeout_s: float) -> Any:
        self.answers = Future()
        self.send(message)
        return self.answers.result(timeout_s)


# ---------------------------------------------------------------------------------------------------- in a member


class _PipeConductor:
    """A `ConductorClient`: calls go to the parent, answers come back by number."""

    def __init__(self, send: Callable[[tuple[str, Any]], None]) -> None:
        self._send, self._numbers = send, iter(range(1 << 60))
        self._waiting: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Future[Any]]] = {}

    async def join(self, event: Join) -> None:
        await self._call("join", event)

    async def tell(self, event: Event) -> None:
        await self._call("tell", event)

    async def next_commands(self, member_id: str, after: int, timeout_s: float) -> tuple[int, list[Command]]:
        last, commands = await self._call("next_commands", member_id, after, timeout_s)
        return last, commands

    def answered(self, number: int, answer: Any) -> None:
        loop, future = self._waiting.pop(number)
        loop.call_soon_threadsafe(lambda: None if future.done() else future.set_result(answer))

    async def _call(self, method: str, *arguments: Any) -> Any:
        number, loop = next(self._numbers), asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._waiting[number] = loop, future
        try:
            self._send(("conductor", (number, method, arguments)))
        except OSError as error:
            raise Unavailable(str(error)) from error
        return await future


def _member(connection: Connection, name: str, role: str, gpu: int, options: WorldOptions) -> None:
    faulthandler.register(signal.SIGUSR1)
    if options.device == "cuda":
        if options.isolated:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
        torch.cuda.set_device(0 if options.isolated else gpu)
    else:
        torch.set_num_threads(1)
    lock = threading.Lock()

    def send(message: tuple[str, Any]) -> None:
        with lock:
            connection.send(message)

    try:
        with tempfile.TemporaryDirectory() as folder:
            member = _Member(name, role, options, Path(folder), send)
            member.obey(connection)
    except BaseException:
        with contextlib.suppress(OSError):
            send(("error", f"{name}: {traceback.format_exc()}"))


class _Member:
    def __init__(
        self, name: str, role: str, options: WorldOptions, folder: Path, send: Callable[[tuple[str, Any]], None]
    ) -> None:
        self._send, self._options = send, options
        self._device = device = torch.device("cpu")
        if options.device == "cuda":
            self._device = device = torch.device("cuda", torch.cuda.current_device())
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        checkpoint = open_case(options.case, folder, num_layers=options.num_layers)
        config = checkpoint.config
        self._conductor = _PipeConductor(send)
        self.mesh = options.mesh_type(
            f"{name}#0",
            attention=role != "expert",
            experts=LocalExpertMLP(checkpoint, dtype=dtype, device=device) if role != "attention" else None,
            shape=RowShape(hidden_size=config.hidden_size, top_k=config.top_k, dtype=dtype, device=device),
            options=MeshOptions(
                cluster_token="bench",
                max_prefill_tokens_per_step=options.scheduler.max_prefill_tokens_per_step,
                exchange=options.exchange,
                buckets=options.scheduler.graph_buckets if device.type == "cuda" else (),
            ),
            on_trouble=lambda epoch, error: self.agent.on_trouble(epoch, error),
        )
        self.agent = MemberAgent(self.mesh, self._conductor)
        block_bytes = CacheConfig().block_size * config.kv_bytes_per_token(dtype.itemsize)
        num_blocks = options.kv_memory_bytes // block_bytes
        cache = CacheConfig(enable_prefix_cache=options.enable_prefix_cache, num_blocks=num_blocks)
        self.engine: LocalEngine | None = None
        if role == "expert":
            StepServer(self.mesh, Telemetry()).start()
        else:
            self.engine = _SendingEngine(
                send,
                checkpoint,
                cache=cache,
                scheduler=options.scheduler,
                batch_invariant=options.batch_invariant or device.type == "cpu",
                mesh=self.mesh,
                device=device,
                max_model_len=options.max_model_len,
            )
            self.engine.engine.start()
        self.agent.start()

    def obey(self, connection: Connection) -> None:
        while True:
            try:
                kind, value = connection.recv()
            except EOFError:
                return
            if kind == "conductor":
                self._conductor.answered(*value)
            elif kind == "submit":
                assert self.engine is not None
                for request in value:
                    self.engine.submit(request)
            elif kind == "drain":
                threading.Thread(target=self._drain, args=(value,), daemon=True).start()
            elif kind == "captures":
                self._send(("answer", self._captures))
            elif kind == "facts":
                self._send(("answer", self._facts()))
            elif kind == "work":
                self._send(("answer", self._work()))
            elif kind == "preemptions":
                assert self.engine is not None
                self._send(("answer", self.engine.engine.scheduler.num_preemptions))

    @property
    def _captures(self) -> tuple[int, int]:
        runner = getattr(self.engine, "runner", None)
        return getattr(runner, "num_captures", 0), getattr(runner, "num_replays", 0)

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = dict(zip(("captures", "replays"), self._captures, strict=True)) | {"device": "cpu"}
        if self._device.type == "cuda":
            facts["device"] = torch.cuda.get_device_name(self._device)
            facts["peak_gb"] = torch.cuda.max_memory_allocated(self._device) / 1e9
        return facts

    def _work(self) -> tuple[float, float, int]:
        """(clock, seconds in which this member's GPU computed rows, rows under the placement in force)."""
        experts = self.mesh.experts
        assert isinstance(experts, LocalExpertMLP)
        return perf_counter(), experts.busy_s(), int(self.mesh.load()[1].sum())

    def _drain(self, timeout_s: float) -> None:
        self._send(("answer", self.agent.drain(timeout_s)))


class _SendingEngine(LocalEngine):
    def __init__(self, send: Callable[[tuple[str, Any]], None], *arguments: Any, **options: Any) -> None:
        self._send = send
        super().__init__(*arguments, **options)

    def _take(self, outputs: list[RequestOutput]) -> None:
        self._send(("outputs", outputs))
