"""Time the expert layer against its floor and against every peer that is installed.

    python -P -m expertmesh.kernels.bench                 the default cells; exits 1 where a must is broken
    python -P -m expertmesh.kernels.bench --model 30b --locals 128 --tokens 1,64 --form fp8 --routing zipf
    python -P -m expertmesh.kernels.bench --all           every model, shard size, form and routing

Each figure is the median over replays of one CUDA graph that holds several independent routings, so weights have left
the L2 before they are read again. Whole layer: ids and rows in, combined rows out. Products: the two grouped products
(and SwiGLU) alone, rows already in order. The last line is one JSON object with every figure."""

import argparse
import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import bench_inputs, bench_peers, bench_report, jit, reference
from .bench_clock import Call, Ceilings, measure_ceilings, median_us
from .bench_inputs import FORMS, MODELS, TOP_K, Draw, Shape, Weights
from .bench_operations import gemm_us, operation_times, plan_for, stage_times
from .bench_report import Cell
from .expert_layer import ExpertLayer, LayerForm
from .grouped_gemm_mma import MmaPlan, make_plan
from .plan import GemmPlan

TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
FEW_TOKENS = (1, 8, 32, 64)  # what int4 is for
DEFAULT_CELLS: tuple[tuple[Shape, tuple[int, ...]], ...] = (
    *((Shape("235b", n, form), TOKENS) for n in (16, 128) for form in ("bf16", "fp8")),
    *((Shape("235b", n, form), (64,) if form == "fp8" else FEW_TOKENS) for n in (16, 128) for form in ("fp8", "int4")),
    *((Shape(model, n, form), FEW_TOKENS) for model, n in (("30b", 128), ("480b", 16)) for form in ("fp8", "int4")),
)
WRONG_PEER = 0.1  # relative difference from us above which a peer computed something else


def main() -> int:
    options = parse()
    if options.watchdog:
        jit.set_debug(WATCHDOG=1)
    started = time.monotonic()
    ceilings = Ceilings(1.0, 1.0, 1.0) if options.once else measure_ceilings()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}: {ceilings}", flush=True)
    cells: list[Cell] = []
    failures: list[str] = []
    for shape, routing, tokens in chosen_cells(options):
        if time.monotonic() - started > options.time_limit:
            failures.append(f"{shape.model} {shape.form} {shape.num_local} {routing}: not measured, out of time")
            continue
        try:
            for cell in measure(shape, routing, tokens, options, ceilings):
                cells.append(cell)
                print(bench_report.cell_line(cell), flush=True)
        except Exception as error:  # what was measured is still reported
            traceback.print_exc()
            failures.append(f"{shape.model} {shape.form} {shape.num_local} {routing}: {error!r}")
            if isinstance(error, torch.AcceleratorError):
                break
        if options.out:
            Path(options.out).write_text(json.dumps(summary(cells, failures, device, ceilings), indent=1))
    if options.once:
        return len(failures) > 0
    if options.markdown:
        print(bench_report.markdown(cells, device))
    made = summary(cells, failures, device, ceilings)
    for name in ("broken", "missed"):
        for line in made[name]:
            print(f"{name}: {line}")
    print(f"{len(cells)} cells in {time.monotonic() - started:.0f} s")
    print(json.dumps(made))
    return len(made["broken"]) > 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="235b", help=f"of {', '.join(MODELS)}; several with commas")
    parser.add_argument("--tokens", default="", help=f"default {','.join(map(str, TOKENS))}")
    parser.add_argument("--locals", default="16,128", help="experts of this shard")
    parser.add_argument("--form", default="bf16,fp8", help=f"of {', '.join(FORMS)}")
    parser.add_argument("--routing", default="uniform", help="uniform, zipf")
    parser.add_argument(
        "--plans",
        default="",
        help="compare plans: m_rows x tile x stages x cluster x rows_wide (128x64x9x1x0,...), "
        "of w8a16 and int4: m_rows x tile x ctas x parts",
    )
    parser.add_argument("--stages", action="store_true", help="also time route, gather and products as they overlap")
    parser.add_argument("--operations", action="store_true", help="also time each operation alone (default cells do)")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--all", action="store_true", help="every model, shard size, form and routing")
    parser.add_argument("--markdown", action="store_true", help="also print tables")
    parser.add_argument("--out", default="", help="write the figures as JSON after each shape")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds; begin no shape after that")
    parser.add_argument("--watchdog", action="store_true", help="kernels end with an error instead of hanging")
    parser.add_argument("--once", action="store_true", help="one call a cell and no clock: to compile, or to profile")
    options = parser.parse_args()
    options.default = not options.all and all(
        getattr(options, name) == parser.get_default(name)
        for name in ("model", "tokens", "locals", "form", "routing", "plans")
    )
    options.operations |= options.default
    return options


def chosen_cells(options: argparse.Namespace) -> Iterator[tuple[Shape, str, tuple[int, ...]]]:
    if options.default:
        yield from ((shape, "uniform", tokens) for shape, tokens in DEFAULT_CELLS)
        return
    models = list(MODELS) if options.all else options.model.split(",")
    shards = (8, 16, 64, 128) if options.all else _numbers(options.locals)
    forms = FORMS if options.all else options.form.split(",")
    routings = ("uniform", "zipf") if options.all else options.routing.split(",")
    tokens = _numbers(options.tokens) if options.tokens else TOKENS
    for model in models:
        for num_local in shards:
            for form in forms:
                for routing in routings:
                    yield Shape(model, num_local, form), routing, tokens


def measure(
    shape: Shape, routing: str, tokens: tuple[int, ...], options: argparse.Namespace, ceilings: Ceilings
) -> Iterator[Cell]:
    weights = bench_inputs.make_weights(shape)
    layer = bench_inputs.make_layer(shape, weights)
    case = bench_peers.Case(shape, weights.w13, weights.w2, weights.scales)  # type: ignore[arg-type]
    peers = [] if options.no_peers or options.plans else bench_peers.peers_present(shape.form)  # none has our int4
    for num_tokens in tokens:
        draws = bench_inputs.make_draws(shape, num_tokens, routing)
        expected_pairs = num_tokens * TOP_K * shape.num_local / shape.num_experts
        if options.once:
            draws = draws[:1]
        layer_peers, gemm_peers = peer_times(peers, case, layer, draws, options.once)
        for plan in parse_plans(options.plans, shape.form):
            calls = [_layer_call(layer, d, expected_pairs, plan) for d in draws]
            if options.once:
                calls[0]()
                torch.cuda.synchronize()
                continue
            us = median_us(calls)
            chosen = plan or plan_for(layer, expected_pairs)
            notes = [] if plan is None else [f"plan {describe(plan)}"]
            if options.stages and not isinstance(plan, MmaPlan):
                notes += [f"{n} {t}" for n, t in stage_times(layer, draws, expected_pairs, plan).items()]
            operations = operation_times(shape, layer, draws, expected_pairs) if options.operations else {}
            products = operations["grouped_gemm"][0] if operations else None
            if gemm_peers and products is None:
                products = gemm_us(layer, draws, chosen)
            yield Cell(
                model=shape.model,
                form=shape.form,
                num_local=shape.num_local,
                routing=routing,
                num_tokens=num_tokens,
                num_pairs=sum(d.num_pairs for d in draws) / len(draws),
                floor_us=bench_inputs.floor_us(draws, shape, ceilings),
                us=us,
                gbps=bench_inputs.touched_bytes(draws, shape) / us / 1e3,
                tflops=bench_inputs.flops(draws, shape) / us / 1e6,
                errors=errors_of(shape, layer, draws[0], weights, chosen),
                gemms_us=products,
                layer_peers=layer_peers,
                gemm_peers=gemm_peers,
                operations=operations,
                note=", ".join(notes),
            )
        del draws
    case.derived.clear()
    torch.cuda.empty_cache()


def peer_times(
    peers: list[bench_peers.Peer], case: bench_peers.Case, layer: ExpertLayer, draws: list[Draw], once: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds by name, of whole layers and of products alone. A peer that fails or computes something else is
    left out and named on stderr."""
    whole: dict[str, float] = {}
    products: dict[str, float] = {}
    for peer in peers:
        try:
            calls = [c for c in (peer.make(case, d) for d in draws) if c is not None]
            if not calls:
                continue
            first = calls[0]()
            if once:
                torch.cuda.synchronize()
                continue
            if peer.whole_layer:
                ours = layer.combined(draws[0].x, draws[0].ids, draws[0].weights).float()
                difference = float((first.float() - ours).norm() / ours.norm())
                if not difference < WRONG_PEER:
                    raise ValueError(f"differs from us by {difference:.2f}")
            (whole if peer.whole_layer else products)[peer.name] = median_us(calls)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            print(f"{peer.name} {case.shape} T {draws[0].x.shape[0]}: left out, {error!r}"[:400], file=sys.stderr)
    return whole, products


def errors_of(
    shape: Shape, layer: ExpertLayer, d: Draw, weights: Weights, plan: GemmPlan | MmaPlan
) -> dict[str, tuple[float, float]]:
    """Relative errors and their bounds, of the first 4 tokens that have a local expert, against float64 on the numbers
    that the form holds; W8A8 also against the same with rows quantised as the kernels do."""
    some = (d.ids >= 0).any(-1).nonzero().flatten()[:4]
    got = layer.combined(d.x, d.ids, d.weights, plan=plan)[some].double()
    x, ids, topk_weights = d.x[some], d.ids[some], d.weights[some]

    def error(y: torch.Tensor) -> float:
        expected = reference.combine(y, ids, topk_weights, dtype=torch.float64)
        return float((got - expected).norm() / expected.norm())

    exact = error(reference.expert_rows(x, ids, *weights.exact(), dtype=torch.float64))
    if shape.form != "fp8":
        return {"float64": (exact, 1e-2)}
    w13, w2 = weights.w13, weights.w2
    same = reference.expert_rows_fp8(x, ids, w13, w2, *weights.scales, dtype=torch.float64)  # type: ignore[arg-type]
    return {"same e4m3 rows": (error(same), 1e-2), "unquantised rows": (exact, 6e-2)}


def summary(cells: list[Cell], failures: list[str], device: str, ceilings: Ceilings) -> dict[str, Any]:
    return {
        "device": device,
        "torch": torch.__version__,
        "ceilings": dataclasses.asdict(ceilings),
        "broken": failures + bench_report.broken_musts(cells),
        "missed": bench_report.missed_goals(cells, device),
        "cells": [_rounded(dataclasses.asdict(c)) for c in cells],
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def describe(plan: GemmPlan | MmaPlan) -> str:
    if isinstance(plan, MmaPlan):
        return f"{plan.m_rows}x{plan.tile}x{plan.ctas}x{plan.parts}"
    return f"{plan.m_rows}x{plan.tile}x{plan.stages}x{plan.cluster}x{int(plan.rows_wide)}"


def parse_plans(text: str, form: LayerForm) -> list[GemmPlan | MmaPlan | None]:
    if not text:
        return [None]
    plans: list[GemmPlan | MmaPlan | None] = []
    for numbers in ([int(v) for v in p.split("x")] for p in text.split(",")):
        if form == "w8a16" or form == "int4":
            m_rows, tile, ctas, parts = numbers
            plans.append(make_plan(m_rows, tile, form, ctas=ctas, parts=parts))
        else:
            m_rows, tile, stages, cluster, wide = numbers
            plans.append(
                GemmPlan(m_rows=m_rows, tile=tile, stages=stages, cluster=cluster, rows_wide=bool(wide), form=form)
            )
    return plans


def _layer_call(layer: ExpertLayer, d: Draw, expected_pairs: float, plan: GemmPlan | MmaPlan | None) -> Call:
    return lambda: layer.combined(d.x, d.ids, d.weights, expected_pairs=expected_pairs, plan=plan)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(v) for v in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
