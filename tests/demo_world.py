"""The demo model behind a real gateway, engine and link in this process, on loopback."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import torch

from expertmesh.checkpoint import Checkpoint
from expertmesh.client import AsyncClient
from expertmesh.cluster.attention.engine import Engine
from expertmesh.cluster.attention.grammar import GrammarCompiler
from expertmesh.cluster.attention.runner import Runner
from expertmesh.config import CacheConfig, SchedulerConfig
from expertmesh.experts.mlp import LocalExpertMLP
from expertmesh.router.exchange import RowShape
from expertmesh.router.gateway.generation import GenerationConfig
from expertmesh.router.gateway.journal import Journal
from expertmesh.router.gateway.link import LinkServer
from expertmesh.router.gateway.server import GatewayServer
from expertmesh.router.gateway.tier import AttentionTier
from expertmesh.router.gateway.tokenizer import Tokenizer
from expertmesh.router.local_mesh import LocalMesh
from expertmesh.router.placement import uniform

CHECKPOINT = Path(__file__).resolve().parents[1] / "deploy" / "demo_model" / "checkpoint"
TOKENIZER = Tokenizer.for_checkpoint(CHECKPOINT)
MAX_MODEL_LEN = 1024
TOKEN = "t"


CONFIG = GenerationConfig(
    model="demo", max_model_len=MAX_MODEL_LEN, vocab_size=Checkpoint(CHECKPOINT).config.vocab_size
)


@dataclass(frozen=True)
class DemoWorld:
    client: AsyncClient
    engines: list[Engine]
    links: list[LinkServer]
    server: GatewayServer


@contextlib.asynccontextmanager
async def demo_world(
    *, replicas: int = 1, num_blocks: int = 1024, journal: Journal | None = None, **scheduler
) -> AsyncIterator[DemoWorld]:
    """Ends with every KV block free in every engine that was not stopped meanwhile."""
    torch.set_num_threads(1)
    checkpoint = Checkpoint(CHECKPOINT)
    model = checkpoint.config
    placement = uniform(model.num_layers, model.num_experts, 1, moe_layers=model.moe_layer_ids)
    shape = RowShape(hidden_size=model.hidden_size, top_k=model.top_k, dtype=torch.float32)
    tier = AttentionTier(gateway_id="g", cluster_token=TOKEN)
    engines, links, meshes = [], [], []
    for index in range(replicas):
        runner = Runner.load(checkpoint, CacheConfig(num_blocks=num_blocks))
        mesh = LocalMesh(LocalExpertMLP(checkpoint), placement, shape)
        link = LinkServer(replica_id=f"attention-{index}", max_model_len=MAX_MODEL_LEN, cluster_token=TOKEN)
        engine = Engine(
            runner,
            mesh,
            scheduler=SchedulerConfig(**scheduler),
            publish=link.publish,
            max_model_len=MAX_MODEL_LEN,
            grammars=GrammarCompiler.for_checkpoint(CHECKPOINT, runner.vocab_size),
        )
        mesh.start(engine.on_header)
        engine.start()
        await link.start(engine)
        engines.append(engine)
        links.append(link)
        meshes.append(mesh)
    tier.set_replicas({link.replica_id: link.address for link in links})
    await tier.wait_connected(10, count=replicas)
    server = GatewayServer(CONFIG, tokenizer=TOKENIZER, tier=tier, journal=journal)
    try:
        async with AsyncClient(await server.start()) as client:
            yield DemoWorld(client, engines, links, server)
        await server.drain(5)
        for engine in engines:
            load = engine.load()
            if engine.failure is None:
                assert (load.num_running, load.num_waiting) == (0, 0)
                assert load.num_free_kv_blocks == load.num_kv_blocks
    finally:
        await server.stop()
        await tier.close()
        for link, engine, mesh in zip(links, engines, meshes):
            await link.stop()
            engine.stop()
            mesh.close()


@contextlib.asynccontextmanager
async def another_gateway(world: DemoWorld, journal: Journal) -> AsyncIterator[str]:
    """One more, before the same replicas; its address."""
    tier = AttentionTier(gateway_id="h", cluster_token=TOKEN)
    tier.set_replicas({link.replica_id: link.address for link in world.links})
    await tier.wait_connected(10, count=len(world.links))
    server = GatewayServer(CONFIG, tokenizer=TOKENIZER, tier=tier, journal=journal)
    try:
        yield await server.start()
        await server.drain(5)
    finally:
        await server.stop()
        await tier.close()
