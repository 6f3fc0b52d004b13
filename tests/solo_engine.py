"""The whole model in one process, without Ray, sockets or exchange: what a cluster's tokens must equal."""

import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from expertmesh.checkpoint import Checkpoint
from expertmesh.cluster.attention.engine import Engine
from expertmesh.cluster.attention.runner import Runner
from expertmesh.config import CacheConfig, SchedulerConfig
from expertmesh.experts.mlp import LocalExpertMLP
from expertmesh.request import EngineRequest, RequestOutput, SamplingParams
from expertmesh.router.exchange import RowShape
from expertmesh.router.local_mesh import LocalMesh
from expertmesh.router.placement import uniform

PROMPTS = [[1, 2, 3], list(range(1000, 1050)), [7], list(range(500, 537))]
NUM_TOKENS = 200  # of each, which the fixture `solo` has of one process


def solo_tokens(folder: Path, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Greedy continuation of each prompt, one request at a time."""
    torch.set_num_threads(1)
    checkpoint = Checkpoint(folder)
    model = checkpoint.config
    runner = Runner.load(checkpoint, CacheConfig(kv_memory_bytes=8 << 20))
    experts = LocalExpertMLP(checkpoint)
    placement = uniform(model.num_layers, model.num_experts, 1, moe_layers=model.moe_layer_ids)
    shape = RowShape(hidden_size=model.hidden_size, top_k=model.top_k, dtype=torch.float32)
    mesh = LocalMesh(experts, placement, shape)
    collector = _Collector()
    engine = Engine(
        runner,
        mesh,
        scheduler=SchedulerConfig(),
        publish=collector.take,
        max_model_len=model.max_position_embeddings,
        enable_prefix_cache=False,
    )
    mesh.start(engine.on_header)
    engine.start()
    try:
        return [collector.run(engine, f"r{i}", prompt, max_tokens) for i, prompt in enumerate(prompts)]
    finally:
        engine.stop()
        mesh.close()


class _Collector:
    def __init__(self) -> None:
        self._ended = threading.Event()
        self._token_ids: list[int] = []

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            self._token_ids.extend(output.token_ids)
            if output.finish_reason:
                self._ended.set()

    def run(self, engine: Engine, request_id: str, prompt: Sequence[int], max_tokens: int) -> list[int]:
        self._ended.clear()
        self._token_ids = []
        sampling = SamplingParams(max_tokens=max_tokens)
        engine.submit(EngineRequest(request_id=request_id, prompt_ids=tuple(prompt), sampling=sampling))
        assert self._ended.wait(60), f"{request_id} did not end"
        return self._token_ids
