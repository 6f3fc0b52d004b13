"""How fast a checkpoint's files become a GPU's experts and attention weights, by number of reading threads.

Writes a few layers of a case as safetensors files (noise made on the device), then loads them as a replica and a shard
do: own slices, read in parallel through pinned memory, every value looked at, packed on the device, straight into the
pool. The files lie in the page cache: what is measured is everything but the disk. What was loaded must be, bit for
bit, what the noise is when no file lies in between.

    python -m expertmesh.bench.loading --case 30b --layers 4 --threads 1,4,8,16"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from .. import parallel_reads
from ..checkpoint import INDEX_NAME, Checkpoint
from ..cluster.attention.weights import AttentionWeights, load_attention_weights
from ..experts.mlp import LocalExpertMLP
from ..numerics import Numerics
from ..router.placement import uniform
from .step_cases import CASES, open_case


def write_files(made: Checkpoint, device: torch.device) -> int:
    """Every tensor of `made` into its folder, a file for each layer; bytes written."""
    groups: dict[str, list[str]] = {}
    for name in made.names:
        parts = name.split(".")
        groups.setdefault(f"layer-{parts[2]}" if parts[1] == "layers" else "rest", []).append(name)
    weight_map: dict[str, str] = {}
    for group, names in groups.items():
        file = f"{group}.safetensors"
        tensors = {name: made.as_stored(name, made.shape(name), device=device).cpu() for name in names}
        save_file(tensors, made.folder / file)
        weight_map |= dict.fromkeys(names, file)
    (made.folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return sum(made.entry(name).num_bytes for name in made.names)


def load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[AttentionWeights, LocalExpertMLP]:
    config = checkpoint.config
    weights = load_attention_weights(checkpoint, dtype=dtype, device=device)
    experts = LocalExpertMLP(checkpoint, Numerics(), dtype=dtype, device=device)
    placement = uniform(config.num_layers, config.num_experts, 1, moe_layers=config.moe_layer_ids)
    experts.set_placement(placement, 0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return weights, experts


def same(a: tuple[AttentionWeights, LocalExpertMLP], b: tuple[AttentionWeights, LocalExpertMLP], top_k: int) -> bool:
    """Attention weights by their bits, experts by the rows that every one of them gives."""
    for one, other in zip(a[0].layers, b[0].layers, strict=True):
        if not all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("qkv", "o", "qk_norm", "gate")):
            return False
    embed, config = a[0].embed, a[1].checkpoint.config
    rows = embed[: config.num_experts]
    first = torch.arange(config.num_experts, dtype=torch.int32, device=embed.device)[:, None]
    ids = (first + torch.arange(top_k, dtype=torch.int32, device=embed.device)) % config.num_experts
    pairs = [[experts.forward(layer_id, rows, ids) for _, experts in (a, b)] for layer_id in config.moe_layer_ids]
    return all(torch.equal(x, y) for x, y in pairs) and bool(torch.equal(embed, b[0].embed))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=tuple(CASES), default="30b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", default="1,4,8,16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", default=None, help="where the files are written for the time of the run")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    torch.set_num_threads(1)  # as in a replica: the readers are the threads
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        dummy = open_case(arguments.case, folder, num_layers=arguments.layers)
        num_bytes = write_files(dummy, device)
        started = time.perf_counter()
        truth = load(dummy, device, dtype)
        print(f"{num_bytes / 1e9:.2f} GB as noise: {time.perf_counter() - started:.2f} s", flush=True)
        alike = True
        for num in (int(part) for part in arguments.threads.split(",")):
            parallel_reads.MAX_THREADS = num
            started = time.perf_counter()
            loaded = load(Checkpoint(folder), device, dtype)
            elapsed = time.perf_counter() - started
            found[str(num)] = num_bytes / elapsed / 1e9
            alike = alike and (device.type == "cpu" or same(truth, loaded, dummy.config.top_k))
            print(f"{num} threads: {elapsed:.2f} s, {found[str(num)]:.2f} GB/s", flush=True)
            del loaded
    print(json.dumps({"case": arguments.case, "gb": num_bytes / 1e9, "gb_per_s": found, "bits_alike": alike}))
    return 0 if alike else 1


if __name__ == "__main__":
    sys.exit(main())
