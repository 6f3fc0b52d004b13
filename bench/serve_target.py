"""What a load is put on: gateways that serve already, or a cluster that is started for it and ended after it."""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc

from ..config import ClusterConfig, override
from ..proto import expertmesh_pb2 as pb
from ..proto import expertmesh_pb2_grpc as rpc

# Of the size that two CPU cores serve, with the vocabulary of Qwen3.
SMALL_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "torch_dtype": "float32",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
SMALL_MOE_SHAPE = "4 layers, hidden 256, 64 experts top-8 of width 128, float32"


@dataclass(frozen=True, slots=True)
class Target:
    gateways: Sequence[str]
    device: str
    shape: str
    ready_s: float = 0.0  # from the word to start to READY; 0 where it served already
    phases: dict[str, str] = field(default_factory=dict)  # by process: its start, in seconds by phase


@contextlib.contextmanager
def small_moe(config: ClusterConfig) -> Iterator[ClusterConfig]:
    """`config` with the small model's folder, which is made for it."""
    from ..make_checkpoint import make_checkpoint

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bench-moe"
        make_checkpoint(folder, SMALL_MOE, seed=0)
        yield replace(config, model=str(folder))


@contextlib.contextmanager
def started(config: ClusterConfig, shape: str = "") -> Iterator[Target]:
    """A cluster of this process; the gateways take free ports."""
    from ..cluster.app import Cluster

    config = override(config, {"network.gateway_port": "0"})
    begun = time.monotonic()
    with Cluster(config, progress=lambda line: print(line, flush=True)) as cluster:
        ready_s = time.monotonic() - begun
        phases = {p.name: p.detail for p in cluster.state().processes if p.detail}
        yield Target(cluster.gateways, device_name(cluster.config.device), shape or config.model, ready_s, phases)


def device_name(kind: str) -> str:
    """`cuda` is the model of the GPU; else the processor's cores."""
    if kind == "cuda":
        import torch

        return torch.cuda.get_device_name(0)
    return f"cpu, {os.cpu_count()} cores"


@dataclass(frozen=True, slots=True)
class Steps:
    """Of all attention replicas since their start."""

    num_steps: int
    step_s: float
    exchange_s: float

    def __sub__(self, before: "Steps") -> "Steps":
        return Steps(
            self.num_steps - before.num_steps, self.step_s - before.step_s, self.exchange_s - before.exchange_s
        )


def steps_of(gateway: str) -> Steps:
    """As the replicas reported last: up to `REPORT_S` old."""
    with grpc.insecure_channel(gateway) as channel:
        members = rpc.ClusterStub(channel).GetTopology(pb.GetTopologyRequest(), timeout=10).members
    attention = [m for m in members if m.step_s]
    return Steps(
        sum(m.num_steps for m in attention), sum(m.step_s for m in attention), sum(m.exchange_s for m in attention)
    )


REPORT_S = 2.5  # after it the last step of a load is in the reports
