"""Serving speed of a small MoE through gRPC against transformers' batched generate: same checkpoint, machine and run.

`make bench`. Ours: one gateway, one attention replica, two expert shards, a client here, greedy, ignore_eos. Theirs:
`generate` on one batch, the same prompts and lengths. Both get the machine's cores. Goal: ahead at 8 and 32 concurrent.
The last line is JSON; exit 1 where a stream is short or an answer differs in length, never for speed."""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import grpc

from ..config import ClusterConfig, NetworkConfig
from ..proto import expertmesh_pb2 as pb
from ..proto import expertmesh_pb2_grpc as rpc

CONFIG = {
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


@dataclass(frozen=True, slots=True)
class Figures:
    """One run of N concurrent streams. Seconds."""

    tokens_per_s: float
    ttft_p50_s: float
    inter_token_p50_s: float
    inter_token_p99_s: float

    @classmethod
    def of(cls, started: float, arrivals: list[list[float]], starts: list[float]) -> "Figures":
        """`arrivals[i]` are the times of stream i's tokens."""
        gaps = sorted(b - a for times in arrivals for a, b in itertools.pairwise(times))
        end = max(times[-1] for times in arrivals)
        return cls(
            tokens_per_s=sum(map(len, arrivals)) / (end - started),
            ttft_p50_s=statistics.median(times[0] - s for times, s in zip(arrivals, starts)),
            inter_token_p50_s=gaps[len(gaps) // 2],
            inter_token_p99_s=gaps[min(len(gaps) - 1, int(len(gaps) * 0.99))],
        )

    def as_dict(self) -> dict[str, float]:
        return {
            "tokens_per_s": round(self.tokens_per_s, 1),
            "ttft_p50_ms": round(self.ttft_p50_s * 1e3, 2),
            "inter_token_p50_ms": round(self.inter_token_p50_s * 1e3, 2),
            "inter_token_p99_ms": round(self.inter_token_p99_s * 1e3, 2),
        }


def prompts(count: int, length: int) -> list[list[int]]:
    """Different prompts, so that no prefix is shared."""
    return [[(7919 * (i + 1) + 104729 * j) % 150000 for j in range(length)] for i in range(count)]


def run_transformers(folder: Path, batch: list[list[int]], num_tokens: int, threads: int) -> Figures:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    times: list[float] = []

    class Clock(StoppingCriteria):
        def __call__(self, ids, scores, **_):
            times.append(time.perf_counter())
            return torch.zeros(ids.shape[0], dtype=torch.bool)

    def generate() -> float:
        times.clear()
        ids = torch.tensor(batch)
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Clock()]),
            )
        return started

    generate()  # warm-up
    started = generate()
    return Figures.of(started, [list(times) for _ in batch], [started] * len(batch))


async def run_ours(target: str, batch: list[list[int]], num_tokens: int) -> Figures:
    async with grpc.aio.insecure_channel(target) as channel:
        stub = rpc.GenerationStub(channel)
        begun: list[float] = []
        arrivals: list[list[float]] = []

        async def stream(ids: list[int]) -> None:
            request = pb.GenerateRequest(
                token_ids=pb.TokenIds(ids=ids),
                include_token_ids=True,
                sampling=pb.SamplingOptions(temperature=0, max_tokens=num_tokens, ignore_eos=True),
            )
            times: list[float] = []
            begun.append(time.perf_counter())
            async for event in stub.Generate(request, timeout=300):
                kind = event.WhichOneof("event")
                if kind in ("answer", "reasoning"):
                    now = time.perf_counter()
                    times += [now] * len(getattr(event, kind).token_ids)
            arrivals.append(times)

        started = time.perf_counter()
        await asyncio.gather(*(stream(ids) for ids in batch))
    short = [len(t) for t in arrivals if len(t) != num_tokens]
    if short:
        raise SystemExit(f"streams with {short} tokens instead of {num_tokens}")
    return Figures.of(started, arrivals, begun)


def step_split(target: str) -> tuple[float, float]:
    """Seconds of steps and of exchange since start, summed over the attention replicas."""
    with grpc.insecure_channel(target) as channel:
        members = rpc.ClusterStub(channel).GetTopology(pb.GetTopologyRequest(), timeout=10).members
    return sum(m.step_s for m in members), sum(m.exchange_s for m in members)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of transformers")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    arguments = parser.parse_args()

    from ..cluster.app import Cluster
    from ..make_checkpoint import make_checkpoint

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "bench-moe"
        make_checkpoint(folder, CONFIG, seed=0)
        peers = {}
        if not arguments.no_peer:
            for n in arguments.concurrency:
                batch = prompts(n, arguments.prompt_tokens)
                peers[n] = run_transformers(folder, batch, arguments.output_tokens, arguments.threads)
        config = ClusterConfig(
            model=str(folder), num_expert_shards=arguments.shards, network=NetworkConfig(gateway_port=0)
        )
        with Cluster(config) as cluster:
            target = cluster.gateways[0]
            asyncio.run(run_ours(target, prompts(2, 16), 8))  # warm-up
            for n in arguments.concurrency:
                batch = [[i + n for i in p] for p in prompts(n, arguments.prompt_tokens)]
                before = step_split(target)
                ours = asyncio.run(run_ours(target, batch, arguments.output_tokens))
                time.sleep(2.5)  # the status report that holds the last step
                after = step_split(target)
                step_s, exchange_s = after[0] - before[0], after[1] - before[1]
                row = {"concurrency": n, "expertmesh": ours.as_dict()}
                row["exchange_share_of_step"] = round(exchange_s / step_s, 3) if step_s else None
                if n in peers:
                    row["transformers"] = peers[n].as_dict()
                    row["ratio_tokens_per_s"] = round(ours.tokens_per_s / peers[n].tokens_per_s, 3)
                print(json.dumps(row), flush=True)
                rows.append(row)
    print(
        json.dumps(
            {
                "bench": "serve",
                "device": f"cpu, {os.cpu_count()} cores",
                "shape": "4 layers, hidden 256, 64 experts top-8 of width 128, float32",
                "shards": arguments.shards,
                "prompt_tokens": arguments.prompt_tokens,
                "output_tokens": arguments.output_tokens,
                "rows": rows,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
