"""Time the expert layer against its floor and against whatever peer is present.

    python -P -m expertmesh.kernels.bench                 the default cells: Qwen3-235B-A22B, 16 and 128 local experts
    python -P -m expertmesh.kernels.bench --model 30b --locals 128 --tokens 1,64 --form fp8 --routing zipf

Each figure is the median over replays of one CUDA graph that holds several independent routings, so weights have left
the L2 before they are read again. Floor = max(bytes of the touched weights and of the rows / read rate, flops /
matrix rate), both rates measured in the same run. Whole layer: ids and rows in, combined rows out. GEMMs: the two
products on rows already in order (ours: with route and gather, since the counts live on the device)."""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import reference
from .expert_layer import ExpertLayer
from .grouped_gemm import enable_watchdog, grouped_gemm
from .jit import Kernel
from .pack import WeightForm
from .permute import pack_rows, route
from .plan import GemmPlan, choose_plan

MODELS = {
    "30b": (2048, 768, 128),
    "235b": (4096, 1536, 128),
    "480b": (6144, 2560, 160),
}  # hidden, intermediate, experts
TOP_K = 8
DEVICE = "cuda"
Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Ceilings:
    read_gbps: float
    bf16_tflops: float
    fp8_tflops: float


@dataclass(frozen=True, slots=True)
class Draw:
    """One routing of num_tokens tokens; ids of experts that are not local are -1."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    num_pairs: int
    num_distinct: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="235b", choices=MODELS)
    parser.add_argument("--tokens", default="1,8,32,128,512,2048,8192")
    parser.add_argument("--locals", default="16,128")
    parser.add_argument("--form", default="bf16,fp8")
    parser.add_argument("--routing", default="uniform", choices=["uniform", "zipf"])
    parser.add_argument(
        "--plans", default="", help="compare plans m_rows x tile x stages x cluster x rows_wide: 128x64x9x1x0,..."
    )
    parser.add_argument(
        "--stages", action="store_true", help="also time route, gather and products one after the other"
    )
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--all", action="store_true", help="every model, shard size and routing")
    parser.add_argument("--out", default="", help="write the records as JSON")
    parser.add_argument("--watchdog", action="store_true", help="kernels end with an error instead of hanging")
    parser.add_argument("--once", action="store_true", help="one call a cell and no clock, for a profiler")
    options = parser.parse_args()
    if options.watchdog:
        enable_watchdog()
    ceilings = Ceilings(1.0, 1.0, 1.0) if options.once else measure_ceilings()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {ceilings}", flush=True)
    records: list[dict[str, Any]] = []
    models = list(MODELS) if options.all else [options.model]
    locals_ = [8, 16, 64, 128] if options.all else [int(v) for v in options.locals.split(",")]
    for model in models:
        for num_local in locals_:
            for form in options.form.split(","):
                for routing in ["uniform", "zipf"] if options.all else [options.routing]:
                    for record in cells(model, num_local, form, routing, options, ceilings):
                        records.append(record)
                        print(" ".join(f"{k}={v}" for k, v in record.items()), flush=True)
                        if options.out:
                            Path(options.out).write_text(json.dumps(records, indent=1))


def cells(
    model: str, num_local: int, form: str, routing: str, options: argparse.Namespace, ceilings: Ceilings
) -> Iterator[dict[str, Any]]:
    hidden, intermediate, num_experts = MODELS[model]
    w13, w2, scales = make_weights(num_local, hidden, intermediate, form)
    layer = ExpertLayer(w13, w2, *scales, kernels="cuda")
    for num_tokens in [int(v) for v in options.tokens.split(",")]:
        num_draws = 16 if num_tokens == 1 else 8 if num_tokens <= 128 else 3 if num_tokens <= 2048 else 2
        draws = [
            draw(num_tokens, num_local, num_experts, hidden, routing, 100 * num_tokens + s) for s in range(num_draws)
        ]
        pairs = sum(d.num_pairs for d in draws) / num_draws
        expected = num_tokens * TOP_K * num_local / num_experts
        floor = floor_us(draws, hidden, intermediate, form, ceilings)
        base = {
            "model": model,
            "form": form,
            "local": num_local,
            "T": num_tokens,
            "pairs": round(pairs),
            "floor": round(floor, 1),
        }
        if routing != "uniform":
            base["routing"] = routing
        peer = None
        if not options.no_peers and form == "bf16":
            peer = median_us([torch_products(d, w13, w2, num_local) for d in draws])
        for plan in parse_plans(options.plans, form):
            calls = [_layer_call(layer, d, expected, plan) for d in draws]
            if options.once:
                calls[0]()
                torch.cuda.synchronize()
                continue
            us = median_us(calls)
            record = {**base, "us": round(us, 1), "x": round(us / floor, 3)}
            if plan:
                record["plan"] = f"{plan.m_rows}x{plan.tile}x{plan.stages}x{plan.cluster}x{int(plan.rows_wide)}"
            byts = (
                sum(d.num_distinct for d in draws) / num_draws * 3 * hidden * intermediate * (1 if form == "fp8" else 2)
            )
            record |= {"GBps": round(byts / us / 1e3), "TFLOPs": round(pairs * 6 * hidden * intermediate / us / 1e6, 1)}
            if num_tokens in (8, 512):
                record["err"] = f"{check(layer, draws[0], w13, w2, scales, plan):.1e}"
            if options.stages:
                record |= stage_times(layer, draws, expected, plan)
            if peer is not None:
                record["torch_gemms"] = round(peer, 1)
            yield record
        del draws
    del layer, w13, w2, scales
    torch.cuda.empty_cache()


def _layer_call(layer: ExpertLayer, d: Draw, expected: float, plan: GemmPlan | None) -> Call:
    return lambda: layer.combined(d.x, d.ids, d.weights, expected_pairs=expected, plan=plan)


def parse_plans(text: str, form: str) -> list[GemmPlan | None]:
    if not text:
        return [None]
    shapes = [[int(v) for v in p.split("x")] for p in text.split(",")]
    kind: WeightForm = "fp8" if form == "fp8" else "bf16"
    return [
        GemmPlan(m_rows=m, tile=t, stages=s, cluster=c, rows_wide=bool(wide), form=kind) for m, t, s, c, wide in shapes
    ]


def stage_times(layer: ExpertLayer, draws: list[Draw], expected: float, plan: GemmPlan | None) -> dict[str, float]:
    """Microseconds of route, route + gather, and route + gather + products."""
    packed = layer.packed
    assert packed is not None
    plan = plan or choose_plan(packed.form, expected, layer.num_local_experts)

    def run(d: Draw, upto: int) -> None:
        places = route(d.ids, layer.num_local_experts, plan.tile)
        if upto > 0:
            rows, scales = pack_rows(d.x, places, fp8=packed.form == "fp8")
        if upto > 1:
            out = torch.empty(*d.ids.shape, layer.hidden_size, dtype=torch.bfloat16, device=DEVICE)
            grouped_gemm(rows, scales, packed, places, plan, out)

    names = ("route", "+gather", "+gemms")
    return {name: round(median_us([lambda d=d, i=i: run(d, i) for d in draws]), 1) for i, name in enumerate(names)}  # type: ignore[misc]


def check(
    layer: ExpertLayer, d: Draw, w13: torch.Tensor, w2: torch.Tensor, scales: tuple[Any, ...], plan: GemmPlan | None
) -> float:
    """Relative error of the first 4 tokens against float32 arithmetic on the same weights."""
    x, ids, weights = d.x[:4], d.ids[:4], d.weights[:4]
    if scales:
        y = reference.expert_rows_fp8(x, ids, w13, w2, *scales)
    else:
        y = reference.expert_rows(x, ids, w13, w2, dtype=torch.float32)
    expected = reference.combine(y, ids, weights)
    got = layer.combined(d.x, d.ids, d.weights, plan=plan)[:4].float()
    return float((got - expected).norm() / expected.norm())


# --------------------------------------------------------------------------------------------------------------- peers
def torch_products(d: Draw, w13: torch.Tensor, w2: torch.Tensor, num_local: int) -> Call:
    """torch's two grouped products alone, on rows already sorted and with SwiGLU's result already made."""
    flat = d.ids.flatten().long()
    mine = (flat >= 0).nonzero().flatten()
    order = mine[flat[mine].argsort(stable=True)]
    x = d.x[order // TOP_K].contiguous()
    offsets = torch.bincount(flat[order], minlength=num_local).cumsum(0).to(torch.int32)
    h = torch.randn(order.numel(), w2.shape[2], dtype=torch.bfloat16, device=DEVICE)
    product = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
    a, b = w13.transpose(1, 2), w2.transpose(1, 2)
    return lambda: (product(x, a, offs=offsets), product(h, b, offs=offsets))


# -------------------------------------------------------------------------------------------------------------- inputs
def make_weights(
    num_local: int, hidden: int, intermediate: int, form: str
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    torch.manual_seed(3)
    shapes = ((2 * intermediate, hidden), (hidden, intermediate))
    dtype = torch.float8_e4m3fn if form == "fp8" else torch.bfloat16
    out = [torch.empty(num_local, *shape, dtype=dtype, device=DEVICE) for shape in shapes]
    scales = [torch.empty(num_local, r // 128, c // 128, device=DEVICE) for r, c in shapes]
    for w, s in zip(out, scales):
        for e in range(num_local):
            sample = torch.randn(w.shape[1:], device=DEVICE) * 0.02
            if form == "fp8":
                w[e], s[e] = reference.quantize_blocks(sample)
            else:
                w[e] = sample.to(dtype)
    return out[0], out[1], tuple(scales) if form == "fp8" else ()


def draw(num_tokens: int, num_local: int, num_experts: int, hidden: int, routing: str, seed: int) -> Draw:
    """At least one pair is local, as for a shard that was sent rows at all."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    popularity = torch.zeros(num_experts, device=DEVICE)
    if routing == "zipf":
        ranks = torch.randperm(num_experts, device=DEVICE, generator=generator) + 1
        popularity = -1.2 * ranks.float().log()
    while True:
        gumbel = -(
            -torch.rand(num_tokens, num_experts, device=DEVICE, generator=generator).clamp_min(1e-20).log()
        ).log()
        ids = (popularity + gumbel).topk(TOP_K).indices
        if bool((ids < num_local).any()):
            break
    weights = torch.rand(num_tokens, TOP_K, device=DEVICE, generator=generator)
    weights /= weights.sum(-1, keepdim=True)
    x = torch.randn(num_tokens, hidden, device=DEVICE, dtype=torch.bfloat16, generator=generator)
    local = torch.where(ids < num_local, ids, -1).to(torch.int32)
    return Draw(x, local, weights, int((local >= 0).sum()), int(local[local >= 0].unique().numel()))


# --------------------------------------------------------------------------------------------------------------- clock
def floor_us(draws: list[Draw], hidden: int, intermediate: int, form: str, ceilings: Ceilings) -> float:
    n = len(draws)
    weight_bytes = sum(d.num_distinct for d in draws) / n * 3 * hidden * intermediate * (1 if form == "fp8" else 2)
    row_bytes = 2 * draws[0].x.shape[0] * hidden * 2
    flops = sum(d.num_pairs for d in draws) / n * 6 * hidden * intermediate
    rate = ceilings.fp8_tflops if form == "fp8" else ceilings.bf16_tflops
    return max((weight_bytes + row_bytes) / ceilings.read_gbps / 1e3, flops / rate / 1e6)


def measure_read_gbps() -> float:
    x = torch.randint(0, 2**31 - 1, (1 << 30,), dtype=torch.int32, device=DEVICE)
    sink = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    read = Kernel("bench_ceiling.cu", "read_all")
    count = np.int64(x.numel() // 4)
    grid = (4 * torch.cuda.get_device_properties(0).multi_processor_count,)
    return 4 * x.numel() / median_us([lambda: read.launch(grid, 512, (x, count, sink), device=x.device)], 100) / 1e3


def measure_ceilings() -> Ceilings:
    gbps = measure_read_gbps()
    m = 8192
    a, b = (torch.randn(m, m, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    bf16_us = median_us([lambda: torch.mm(a, b.t())], 300)
    qa, qb = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    ra, rb = torch.ones(m, 1, device=DEVICE), torch.ones(1, m, device=DEVICE)
    fp8_us = median_us(
        [lambda: torch._scaled_mm(qa, qb.t(), ra, rb, out_dtype=torch.bfloat16, use_fast_accum=True)], 300
    )
    return Ceilings(round(gbps, 1), round(2 * m**3 / bf16_us / 1e6, 1), round(2 * m**3 / fp8_us / 1e6, 1))


def median_us(calls: list[Call], budget_ms: float = 60.0, groups: int = 5) -> float:
    """Median microseconds of one call; all calls are captured in one graph."""
    for c in calls:
        c()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for c in calls:
            c()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay(n: int) -> float:
        start.record()
        for _ in range(n):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / n

    replay(1)
    n = max(1, min(200, int(budget_ms * 1e3 / groups / max(replay(1), 1.0))))
    return statistics.median(replay(n) for _ in range(groups)) / len(calls)


if __name__ == "__main__":
    main()
