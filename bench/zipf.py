"""`make bench-zipf`: what placing experts anew gains under a Zipf 1.2 load, against what the load model predicts.

A tiny checkpoint whose gate has favourites: expert of rank r in popularity is asked for about r^-1.2 as often as the
first. Four shards serve it from an even placement, with the rows' time as a cost model (`elastic.py`: a timed wait a
row, on no core), since on a host with few cores the shards would only take turns. Then `expertmesh rebalance`, and the
same load again. The gain is the ratio of the expert tier's time in a step, as the attention replica waits for it (what
the load model predicts), and of tokens a second (which the rest of a step dilutes).

    python -P -m expertmesh.bench.zipf [--row-us 2000] [--streams 32]

Exits 1 where a stream fails, says other tokens, or less than 90 % of the predicted gain is measured."""

import argparse
import asyncio
import json
import math
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..client import AnswerDelta, AsyncClient, ReasoningDelta
from ..cluster.app import Cluster
from ..config import CacheConfig, ClusterConfig, NetworkConfig, RebalanceConfig
from ..make_checkpoint import make_checkpoint
from .elastic import use_cost_model
from .elastic_load import say

EXPONENT, SHARDS, REDUNDANT = 1.2, 4, 16
MEASURE_S, WARM_S = 20.0, 4.0
REPORT_S = 2.5  # until the processes' next reports
NOISE = 3.55  # of the gate: makes logits vary by pi / sqrt(6) among tokens, as Gumbel noise does
LEAST = 0.9  # of the predicted gain


def make_skewed(folder: Path, exponent: float, seed: int = 3) -> None:
    """tiny-moe whose gate has favourites: all tokens share a direction, and the gate reads popularity off it.

    The top k of log-popularity plus noise of a Gumbel's width are a sample by popularity without replacement."""
    make_checkpoint(folder, "tiny-moe", seed=seed)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    noise = torch.Generator().manual_seed(seed)
    embed = tensors["model.embed_tokens.weight"].float()
    shared = torch.zeros(embed.shape[1])
    shared[0] = 1.0
    tensors["model.embed_tokens.weight"] = (embed + 8.0 * math.sqrt(embed.shape[1]) * shared).bfloat16()
    for name in [n for n in tensors if n.endswith("mlp.gate.weight")]:
        gate = tensors[name].float()
        num_experts, hidden = gate.shape
        popularity = -exponent * torch.log(torch.arange(1, num_experts + 1).float())
        order = torch.randperm(num_experts, generator=noise)
        rest = torch.randn(gate.shape, generator=noise)
        rest[:, 0] = 0.0
        length = math.sqrt(hidden)  # of a normalised row, nearly all along the shared direction
        tensors[name] = (NOISE * rest + popularity[order][:, None] * shared / length).bfloat16()
    save_file(tensors, path)


async def load(client: AsyncClient, streams: int, until: float, texts: dict[int, list[int]]) -> int:
    """Closed-loop greedy streams until then; tokens that came. Ends the run where a prompt says something new."""
    count = 0

    async def one(number: int) -> None:
        nonlocal count
        while time.monotonic() < until:
            ids: list[int] = []
            stream = client.generate(
                token_ids=[number + 10, 5], temperature=0.0, max_tokens=100, ignore_eos=True, include_token_ids=True
            )
            async for event in stream:
                if isinstance(event, AnswerDelta | ReasoningDelta):
                    ids += event.token_ids
                    count += len(event.token_ids) * (time.monotonic() < until)
            if ids != texts.setdefault(number, ids):
                raise SystemExit(f"prompt {number} says other tokens")

    await asyncio.gather(*map(one, range(streams)))
    return count


@dataclass(frozen=True, slots=True)
class Counters:
    """Sums since the start: rows of each shard; steps of the attention replica, and its seconds waiting for rows."""

    rows: dict[str, int]
    num_steps: int
    exchange_s: float

    @classmethod
    def of(cls, cluster: Cluster) -> "Counters":
        processes = cluster.state().processes
        (attention,) = (p for p in processes if p.role == "attention")
        rows = {p.name: p.num_rows for p in processes if p.role == "expert"}
        return cls(rows, attention.num_steps, attention.exchange_s)

    def since(self, before: "Counters") -> dict[str, float]:
        new = np.array([rows - before.rows.get(name, 0) for name, rows in self.rows.items()], dtype=float)
        waited = (self.exchange_s - before.exchange_s) / (self.num_steps - before.num_steps)
        return {
            "expert_ms_per_step": round(1e3 * waited, 2),
            "rows_max_over_mean": round(float(new.max() / new.mean()), 3),
        }


async def measure(cluster: Cluster, streams: int) -> dict[str, Any]:
    texts: dict[int, list[int]] = {}
    figures: dict[str, Any] = {}
    async with AsyncClient(cluster.gateways, cluster_token=cluster.config.network.cluster_token) as client:
        for phase in ("before", "after"):
            await load(client, streams, time.monotonic() + WARM_S, texts)
            await asyncio.sleep(REPORT_S)
            counters = Counters.of(cluster)
            count = await load(client, streams, time.monotonic() + MEASURE_S, texts)
            await asyncio.sleep(REPORT_S)
            figures[phase] = {"tokens_per_s": round(count / MEASURE_S, 1)} | Counters.of(cluster).since(counters)
            say(f"{phase}: {figures[phase]}")
            if phase == "before":
                summary = await client.rebalance()
                say(summary)
                found = re.search(r"([\d.]+) x predicted", summary)
                figures["predicted"] = float(found[1]) if found else 1.0
    before, after = figures["before"], figures["after"]
    figures["measured"] = round(before["expert_ms_per_step"] / after["expert_ms_per_step"], 3)
    figures["tokens_gain"] = round(after["tokens_per_s"] / before["tokens_per_s"], 3)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row-us", type=float, default=2000.0, help="cost model: time of a row, 0 = none")
    parser.add_argument("--streams", type=int, default=32)
    arguments = parser.parse_args()
    if arguments.row_us:
        use_cost_model(arguments.row_us)
    with tempfile.TemporaryDirectory(prefix="zipf-") as folder:
        make_skewed(Path(folder), EXPONENT)
        config = ClusterConfig(
            model=folder,
            num_expert_shards=SHARDS,
            num_redundant_experts=REDUNDANT,
            network=NetworkConfig(gateway_port=0),
            cache=CacheConfig(kv_memory_bytes=64 << 20),
            rebalance=RebalanceConfig(enabled=False),
        )
        with Cluster(config, progress=say) as cluster:
            figures = asyncio.run(measure(cluster, arguments.streams))
    figures |= {"cost_model_row_us": arguments.row_us, "streams": arguments.streams, "zipf": EXPONENT}
    gained, promised = figures["measured"] - 1.0, figures["predicted"] - 1.0
    short = promised <= 0.05 or gained < LEAST * promised
    if short:
        say(f"FALLS SHORT: {figures['measured']} x measured, {figures['predicted']} x predicted")
    print(json.dumps(figures), flush=True)
    return int(short)


if __name__ == "__main__":
    sys.exit(main())
