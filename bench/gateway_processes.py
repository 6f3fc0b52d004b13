"""An engine and gateways, each a process of its own that can be killed: the route without Ray.

The engine is the demo model, whole, in one process behind the real link. Processes are forked from a server that has
the imports and the tokenizer, so that a gateway is up in a fraction of a second."""

import asyncio
import logging
import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..router.gateway.generation import GenerationConfig
from ..router.gateway.journal import Journal
from ..router.gateway.link import LinkServer
from ..router.gateway.server import GatewayServer
from ..router.gateway.session import SessionStore
from ..router.gateway.tier import AttentionTier
from ..router.gateway.tokenizer import Tokenizer

MODEL = Path(__file__).resolve().parent.parent / "deploy" / "demo_model" / "checkpoint"
TOKEN = "bench"
START_S = 120.0
_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["expertmesh.bench.gateway_preload"])


@cache
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


class _Process:
    """`target(pipe, *arguments)` in a process; what it sends first is its address."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        ours, theirs = _context.Pipe()
        self._process = _context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe = ours
        self.address = ""

    def wait_ready(self) -> str:
        """host:port."""
        if not self._pipe.poll(START_S):
            raise TimeoutError(f"{type(self).__name__} did not start in {START_S:.0f} s")
        self.address = str(self._pipe.recv())
        return self.address

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL, and nothing of it is left when this returns. Safe to call twice."""
        if self._process.exitcode is None:
            os.kill(self.pid, signal.SIGKILL)
        self._process.join()
        self._pipe.close()


class EngineProcess(_Process):
    """The attention tier. A step takes at least `step_s` seconds, so that a stream lasts long enough to be broken."""

    def __init__(self, step_s: float = 0.0) -> None:
        super().__init__(_serve_engine, step_s)


@dataclass(frozen=True, slots=True)
class GatewayPlan:
    link_address: str
    redis_url: str
    port: int = 0  # the same again, so that clients find a gateway that was started anew
    model: Path = MODEL  # its tokenizer
    model_name: str = "demo"
    cluster_token: str = TOKEN
    max_model_len: int = 512


class GatewayProcess(_Process):
    def __init__(self, plan: GatewayPlan) -> None:
        super().__init__(_serve_gateway, plan)


def _serve_gateway(pipe: Connection, plan: GatewayPlan) -> None:
    asyncio.run(_gateway(pipe, plan))


async def _gateway(pipe: Connection, plan: GatewayPlan) -> None:
    logging.disable(logging.WARNING)  # that Redis is away is what the runs are about; a lost turn is an error
    tier = AttentionTier(gateway_id=f"gateway-{os.getpid()}", cluster_token=plan.cluster_token)
    tier.set_replicas({"attention-0": plan.link_address})
    await tier.wait_connected(START_S)
    words = tokenizer(plan.model)
    server = GatewayServer(
        GenerationConfig(model=plan.model_name, max_model_len=plan.max_model_len, vocab_size=words.vocab_size),
        tokenizer=words,
        tier=tier,
        sessions=SessionStore(plan.redis_url),
        journal=Journal(plan.redis_url),
        port=plan.port,
    )
    pipe.send(await server.start())
    await _parent_gone(pipe)


def _serve_engine(pipe: Connection, step_s: float) -> None:
    asyncio.run(_engine(pipe, step_s))


async def _engine(pipe: Connection, step_s: float) -> None:
    import torch

    from ..checkpoint import Checkpoint
    from ..cluster.attention.engine import Engine
    from ..cluster.attention.grammar import GrammarCompiler
    from ..cluster.attention.runner import Runner
    from ..config import CacheConfig, SchedulerConfig
    from ..experts.mlp import LocalExpertMLP
    from ..router.exchange import RowShape
    from ..router.local_mesh import LocalMesh
    from ..router.placement import uniform

    torch.set_num_threads(1)
    checkpoint = Checkpoint(MODEL)
    config = checkpoint.config
    length = config.max_position_embeddings
    link = LinkServer(replica_id="attention-0", max_model_len=length, cluster_token=TOKEN)
    placement = uniform(config.num_layers, config.num_experts, 1, moe_layers=config.moe_layer_ids)
    shape = RowShape(hidden_size=config.hidden_size, top_k=config.top_k, dtype=torch.float32)
    mesh = LocalMesh(LocalExpertMLP(checkpoint), placement, shape)
    due = time.monotonic()

    def publish(outputs: Any) -> None:
        nonlocal due
        time.sleep(max(0.0, due - time.monotonic()))
        due = time.monotonic() + step_s
        link.publish(outputs)

    runner = Runner.load(checkpoint, CacheConfig(kv_memory_bytes=64 << 20))
    engine = Engine(
        runner,
        mesh,
        scheduler=SchedulerConfig(),
        publish=publish,
        max_model_len=length,
        grammars=GrammarCompiler.for_checkpoint(MODEL, runner.vocab_size),
    )
    mesh.start(engine.on_header)
    engine.start()
    pipe.send(await link.start(engine))
    await _parent_gone(pipe)


async def _parent_gone(pipe: Connection) -> None:
    """Until the other end closes, with its process or by its will."""
    gone, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_reader(pipe.fileno(), gone.set)
    await gone.wait()
    os._exit(0)
