"""Paged attention on a GPU: microseconds of a layer's launches against the machine's own ceilings, torch's SDPA on
contiguous K and V beside it, and what a plan costs the host.

    python -P -m expertmesh.bench.attention [--heads 32,4] [--kv-dtype fp8] [--out FILE.json]

Launches are captured in a CUDA graph, over as many layers as keep KV out of L2. Floors: KV, q and o once over the read
rate; 2 products over the bf16 rate, causal half counted."""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..cluster.attention import flash
from ..kernels.bench_clock import Ceilings, measure_ceilings, median_us
from ..kernels.kv_numbers import to_kv

DECODES = [(batch, length) for length in (192, 4096) for batch in (1, 8, 32, 128, 256)]
PREFILLS = [(1, 2048), (16, 1024), (1, 32768)]
HEAD_DIM, BLOCK_SIZE = 128, 16
_CACHE_BYTES = 200 << 20  # of KV read by one graph at least: four times an L2


@dataclass(frozen=True, slots=True)
class Row:
    kind: str
    batch: int
    length: int
    us: float
    floor_us: float
    rate: float  # GB/s of decode, TFLOP/s of prefill
    sdpa_us: float
    plan_us: float  # host time of one plan, the copy's launch included

    def line(self) -> str:
        unit = "GB/s" if self.kind == "decode" else "TFLOP/s"
        return (
            f"| {self.kind} {self.batch} x {self.length} | {self.us:.1f} | {self.us / self.floor_us:.2f} | "
            f"{self.rate:.0f} {unit} | {self.sdpa_us:.1f} | {self.plan_us:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", default="32,4", help="query heads, KV heads")
    parser.add_argument("--kv-dtype", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--out", help="where the rows go as JSON")
    options = parser.parse_args()
    heads, kv_heads = map(int, options.heads.split(","))
    kv_dtype = torch.float8_e4m3fn if options.kv_dtype == "fp8" else torch.bfloat16
    flash.FEW_REQUESTS = 0  # `bench/decode_layer.py` has the launch that takes few decodes whole
    ceilings = measure_ceilings()
    device = torch.cuda.get_device_name()
    print(
        f"{device}; read {ceilings.read_gbps} GB/s, bf16 {ceilings.bf16_tflops} TFLOP/s; {heads} heads on {kv_heads}, "
        f"KV in {options.kv_dtype}"
    )
    print("| case | us | x floor | rate | SDPA us | plan us |\n|---|---|---|---|---|---|")
    rows = []
    for kind, cases in (("decode", DECODES), ("prefill", PREFILLS)):
        for batch, length in cases:
            rows.append(measure(kind, batch, length, heads, kv_heads, ceilings, kv_dtype))
            print(rows[-1].line(), flush=True)
            torch.cuda.empty_cache()
    if options.out:
        with open(options.out, "w") as file:
            json.dump({"device": device, "ceilings": asdict(ceilings), "rows": [asdict(r) for r in rows]}, file)


def measure(
    kind: str, batch: int, length: int, heads: int, kv_heads: int, ceilings: Ceilings, kv_dtype: torch.dtype
) -> Row:
    decode = kind == "decode"
    q_len = 1 if decode else length
    kv_bytes = 2 * batch * length * kv_heads * HEAD_DIM * kv_dtype.itemsize
    io_bytes = 2 * batch * q_len * heads * HEAD_DIM * 2
    layers = max(1, -(-_CACHE_BYTES // kv_bytes)) if decode else 1
    attention = flash.FlashAttention(
        heads,
        kv_heads,
        HEAD_DIM,
        BLOCK_SIZE,
        "cuda",
        kv_dtype=kv_dtype,
        max_num_reqs=max(batch, 8),
        max_num_blocks=length // BLOCK_SIZE,
    )
    blocks = batch * length // BLOCK_SIZE
    table = np.random.default_rng(0).permutation(blocks).astype(np.int32).reshape(batch, -1)
    lens = np.full(batch, length, np.int32)
    shape = (layers, 2, blocks, BLOCK_SIZE, kv_heads, HEAD_DIM)
    cache = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    q = torch.empty(batch * q_len, heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda").normal_()
    out = torch.empty_like(q)

    def plan() -> None:
        attention.plan(np.full(batch, q_len, np.int32), lens, table, bucket=batch if decode else None)

    plan()
    pages = to_kv(cache, kv_dtype)
    us = median_us([_bind(attention.attend, q, pages[i, 0], pages[i, 1], out) for i in range(layers)])
    sdpa_us = median_us([_sdpa(q, cache[i], batch, q_len, length) for i in range(layers)])
    flops = 4 * batch * heads * HEAD_DIM * (length if decode else length * (length + 1) / 2)
    floor_us = max((kv_bytes + io_bytes) / ceilings.read_gbps / 1e3, flops / ceilings.bf16_tflops / 1e6)
    rate = (kv_bytes + io_bytes) / us / 1e3 if decode else flops / us / 1e6
    return Row(kind, batch, length, us, floor_us, rate, sdpa_us, _host_us(plan))


def _sdpa(q: torch.Tensor, cache: torch.Tensor, batch: int, q_len: int, length: int) -> Callable[[], Any]:
    """torch's attention over the same K and V as if they were contiguous."""
    k, v = (x.view(batch, length, x.shape[2], HEAD_DIM).transpose(1, 2) for x in cache)
    rows = q.view(batch, q_len, q.shape[1], HEAD_DIM).transpose(1, 2)

    def call() -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # never the one that writes all scores
            F.scaled_dot_product_attention(rows, k, v, is_causal=q_len > 1, enable_gqa=True)

    return call


def _host_us(plan: Callable[[], None]) -> float:
    """Median of single plans, the GPU idle before each."""
    times = []
    for _ in range(60):
        torch.cuda.synchronize()
        started = perf_counter()
        plan()
        times.append(perf_counter() - started)
    return statistics.median(times) * 1e6


def _bind(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


if __name__ == "__main__":
    main()
