"""The gateway that `fuzz.py` attacks: a process of its own with the demo model's real engine behind the real link.

In one process, so that one resident set and one exit code tell of all of it. It answers "books" on its pipe: what is in
work, what is free, and the errors that handlers logged (each is a bug of ours, whatever the client was told)."""

import asyncio
import contextlib
import logging
import multiprocessing as mp
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch

from ..checkpoint import Checkpoint
from ..cluster.attention.engine import Engine
from ..cluster.attention.runner import Runner
from ..config import CacheConfig, SchedulerConfig
from ..experts.mlp import LocalExpertMLP
from ..router.exchange import RowShape
from ..router.gateway.api_keys import ApiKeys, hash_of
from ..router.gateway.balancer import BalancerConfig
from ..router.gateway.generation import GenerationConfig
from ..router.gateway.journal import Journal
from ..router.gateway.link import LinkServer
from ..router.gateway.server import GatewayServer
from ..router.gateway.session import SessionStore
from ..router.gateway.tier import AttentionTier
from ..router.gateway.tokenizer import Tokenizer
from ..router.gateway.waiting_room import WaitingRoomConfig
from ..router.local_mesh import LocalMesh
from ..router.placement import uniform
from . import malloc

MODEL = Path(__file__).resolve().parent.parent / "deploy" / "demo_model" / "checkpoint"
API_KEYS = {"key-of-alice": "alice", "key-of-bob": "bob"}
CLUSTER_TOKEN = "fuzz"
GRACE_S = 2.0  # of a resumable stream that nobody reads
SCHEDULER = SchedulerConfig(max_num_seqs=12, max_num_batched_tokens=256, max_num_waiting=64)
CACHE = CacheConfig(kv_memory_bytes=12 << 20)  # little: preemption and exhaustion must happen


@dataclass(frozen=True, slots=True)
class Books:
    """What must balance when nobody asks for anything."""

    num_running: int  # generations in the gateway
    num_waiting: int  # in its waiting room
    num_in_flight: int  # requests on the gateway's links
    num_routes: int  # requests that the replica's end of the link knows
    num_engine: int  # running and waiting in the engine
    num_used_kv_blocks: int
    num_tasks: int
    num_threads: int
    num_fds: int  # without those of established connections, which may be the attacker's to close
    peer_ports: tuple[int, ...]  # of established connections, but those to itself
    heap_bytes: int  # malloc's, in use
    num_python_blocks: int  # objects of at most 512 bytes, which are not malloc's
    rss_bytes: int
    errors: tuple[str, ...]  # logged by handlers, since the start


class TargetProcess:
    """The process under attack, as the attacker sees it."""

    def __init__(self, redis_url: str) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_main, args=(theirs, redis_url), daemon=True)
        self.process.start()
        theirs.close()
        if not self._pipe.poll(120):
            raise TimeoutError("the gateway to attack did not start in 120 s")
        self.address: str = self._pipe.recv()

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def books(self, timeout_s: float = 60.0) -> Books:
        """EOFError: it is dead. TimeoutError: its event loop hangs."""
        self._pipe.send("books")
        if not self._pipe.poll(timeout_s):
            raise TimeoutError(f"the gateway's event loop did not answer in {timeout_s:g} s")
        books: Books = self._pipe.recv()
        return books

    def end(self) -> int | None:
        """Its exit code; 0 = it ended as told."""
        with contextlib.suppress(OSError):
            self._pipe.send("end")
        self.process.join(60)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(10)
        return self.process.exitcode


class _ErrorLog(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith("grpc") and len(self.lines) < 100:  # grpc tells of the client's wrong bytes
            self.lines.append(self.format(record)[-2000:])


def _main(pipe: Connection, redis_url: str) -> None:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    malloc.use_one_arena()
    torch.set_num_threads(1)
    asyncio.run(_serve(pipe, redis_url))


async def _serve(pipe: Connection, redis_url: str) -> None:
    errors = _ErrorLog()
    logging.getLogger().addHandler(errors)
    model = Checkpoint(MODEL).config
    tokenizer = Tokenizer(MODEL)
    link = LinkServer(
        replica_id="attention-0", max_model_len=model.max_position_embeddings, cluster_token=CLUSTER_TOKEN
    )
    engine, close_mesh = _real_engine(link)
    await link.start(engine)
    tier = AttentionTier(
        gateway_id="target",
        cluster_token=CLUSTER_TOKEN,
        config=BalancerConfig(max_num_seqs=SCHEDULER.max_num_seqs, queue_ahead=2, max_unreported_tokens=512),
        waiting=WaitingRoomConfig(max_waiting=24, max_waiting_per_key=12),
    )
    tier.set_replicas({link.replica_id: link.address})
    await tier.wait_connected(30)
    sessions, journal = SessionStore(redis_url, max_bytes=64 << 10), Journal(redis_url, ttl_s=20.0)
    server = GatewayServer(
        GenerationConfig(model="demo", max_model_len=512, vocab_size=model.vocab_size),
        tokenizer=tokenizer,
        tier=tier,
        sessions=sessions,
        journal=journal,
        api_keys=ApiKeys({hash_of(key): owner for key, owner in API_KEYS.items()}),
        cluster_token=CLUSTER_TOKEN,
        max_request_bytes=1 << 20,
        resume_grace_s=GRACE_S,
    )
    pipe.send(await server.start())
    process = psutil.Process()

    def books() -> Books:
        malloc.give_back()  # what glibc keeps for later is no leak
        load = engine.load()
        return Books(
            num_running=server.num_running,
            num_waiting=len(tier.waiting_room),
            num_in_flight=tier.num_in_flight,
            num_routes=link.num_requests,
            num_engine=load.num_running + load.num_waiting,
            num_used_kv_blocks=load.num_kv_blocks - load.num_free_kv_blocks,
            num_tasks=len(asyncio.all_tasks()),
            num_threads=process.num_threads(),
            num_fds=process.num_fds() - len(_peer_ports(process)),
            peer_ports=_peer_ports(process),
            heap_bytes=malloc.in_use_bytes(),
            num_python_blocks=sys.getallocatedblocks(),
            rss_bytes=process.memory_info().rss,
            errors=tuple(errors.lines),
        )

    await _answer(pipe, books)
    await server.stop()
    await tier.close()
    await link.stop()
    engine.stop()
    close_mesh()
    await journal.close()
    await sessions.close()


def _peer_ports(process: psutil.Process) -> tuple[int, ...]:
    """The link to the own replica has both ends here."""
    found = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]
    own = {c.laddr.port for c in found}
    return tuple(c.raddr.port for c in found if c.raddr.port not in own)


def _real_engine(link: LinkServer) -> tuple[Engine, Callable[[], None]]:
    """The demo model, whole: (engine, what ends its mesh)."""
    checkpoint = Checkpoint(MODEL)
    config = checkpoint.config
    runner = Runner.load(checkpoint, CACHE)
    placement = uniform(config.num_layers, config.num_experts, 1, moe_layers=config.moe_layer_ids)
    shape = RowShape(hidden_size=config.hidden_size, top_k=config.top_k, dtype=torch.float32)
    mesh = LocalMesh(LocalExpertMLP(checkpoint), placement, shape)
    engine = Engine(
        runner, mesh, scheduler=SCHEDULER, publish=link.publish, max_model_len=config.max_position_embeddings
    )
    mesh.start(engine.on_header)
    engine.start()
    return engine, mesh.close


async def _answer(pipe: Connection, books: Callable[[], Books]) -> None:
    """Until "end", or until the attacker is gone."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def read() -> None:
        with contextlib.suppress(EOFError, OSError):
            if pipe.recv() == "books":
                pipe.send(books())
                return
        loop.remove_reader(pipe.fileno())
        ended.set()

    loop.add_reader(pipe.fileno(), read)
    await ended.wait()


if __name__ == "__main__":
    sys.exit("run `python -P -m expertmesh.bench.fuzz`")
