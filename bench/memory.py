"""How much does a shard grow by loading its experts? `python -P -m expertmesh.bench.memory`

A checkpoint with at least 400 MB of experts, 4 shards, each loaded in a process of its own that reports its resident
memory before and after: growth must be <= 1.3 x the bytes of the shard's own experts, at the end and at the peak.
Exits 1 where it is not; the last line is JSON."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..experts.mlp import LocalExpertMLP
from ..make_checkpoint import make_checkpoint
from ..numerics import Numerics
from ..router.placement import uniform

LIMIT = 1.3
NUM_SHARDS = 4
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -P -m expertmesh.bench.memory", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--expert-mb", type=int, default=400, help="bytes of all experts in memory, in MB (default 400)"
    )
    parser.add_argument("--dtype", default="float32", help="of the weights on disk (default float32)")
    parser.add_argument("--fused", action="store_true", help="experts stored fused")
    parser.add_argument("--shard", nargs=2, metavar=("FOLDER", "EP_RANK"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.shard:
        print(json.dumps(load_shard(args.shard[0], int(args.shard[1]))))
        return 0
    figures = measure(expert_bytes=args.expert_mb * 10**6, dtype=args.dtype, fused=args.fused)
    for shard in figures["shards"]:
        print(
            f"shard {shard['ep_rank']}: own experts {shard['own_bytes'] / 1e6:.1f} MB, "
            f"grew {shard['growth'] / 1e6:.1f} MB = {shard['ratio']:.3f} x (peak {shard['peak_ratio']:.3f} x)"
        )
    print(json.dumps(figures))
    return 0 if figures["ok"] else 1


def measure(*, expert_bytes: int, dtype: str = "float32", fused: bool = False) -> dict[str, Any]:
    """Every shard in a process of its own, one after the other."""
    per_width = 3 * CONFIG["hidden_size"] * CONFIG["num_experts"] * CONFIG["num_hidden_layers"] * 4  # float32 in memory
    width = -(-expert_bytes // per_width // 8) * 8 + 8
    with tempfile.TemporaryDirectory(prefix="expertmesh-memory-") as folder:
        make_checkpoint(folder, CONFIG | {"moe_intermediate_size": width}, dtype=dtype, fused_experts=fused)
        shards = [_in_process_of_its_own(folder, ep_rank) for ep_rank in range(NUM_SHARDS)]
    worst = max(max(s["ratio"], s["peak_ratio"]) for s in shards)
    return {
        "ok": worst <= LIMIT,
        "worst_ratio": worst,
        "limit": LIMIT,
        "expert_bytes": sum(s["own_bytes"] for s in shards),
        "shards": shards,
    }


def load_shard(folder: str, ep_rank: int) -> dict[str, Any]:
    """Load one shard here and say how this process grew; what torch's first calls cost once is not counted."""
    torch.set_num_threads(1)
    torch.aminmax(torch.randn(64, 64).bfloat16().float() @ torch.randn(64, 64))
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    experts = LocalExpertMLP(checkpoint, Numerics())
    before = _status_bytes("VmRSS")
    experts.set_placement(uniform(config.num_layers, config.num_experts, NUM_SHARDS), ep_rank)
    growth, peak = _status_bytes("VmRSS") - before, _status_bytes("VmHWM") - before
    own = experts.resident_bytes
    return {
        "ep_rank": ep_rank,
        "own_bytes": own,
        "growth": growth,
        "ratio": round(growth / own, 4),
        "peak_ratio": round(peak / own, 4),
    }


def _in_process_of_its_own(folder: str, ep_rank: int) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "expertmesh.bench.memory", "--shard", folder, str(ep_rank)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"shard {ep_rank} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _status_bytes(field: str) -> int:
    """VmRSS (resident now) or VmHWM (its peak), from the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the kernel does not report {field}")


if __name__ == "__main__":
    sys.exit(main())
