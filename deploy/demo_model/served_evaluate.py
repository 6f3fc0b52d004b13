"""`make eval-demo`: the held-out set through a running cluster over gRPC, and whether the model's goals are met there.

All modes and the curve of accuracy against thinking budget. Writes the figures and the curve, prints the tables. Exit
code 1 where a goal is missed; the last line is JSON.

`python -P -m expertmesh.deploy.demo_model.served_evaluate --items-per-task 50 --write`"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ...cluster.app import Cluster
from ...config import override
from .card import accuracy_table, budget_svg, budget_table
from .evaluate import ARITHMETIC, BUDGETS, ITEMS_PER_TASK, MODES, report
from .served import Served, demo_config

FOLDER = Path(__file__).parent
MIN_ITEMS = 500  # fewer are a sample, not the evaluation
NUM_JOBS = len(MODES) + 1 + len(BUDGETS)  # all at a time, so that the cluster's batch is full to the end
Goal = tuple[str, float, float]  # what, measured, at least


def goals(result: dict[str, Any]) -> list[Goal]:
    """What the demo model promises, from a report of `evaluate.py`. Shares; gaps are differences of shares."""
    think, direct, curve = result["accuracy"]["think"], result["accuracy"]["no_think"], result["budget_curve"]
    points = [point["accuracy"]["all"] for point in curve]
    gap = sum(think[task] - direct[task] for task in ARITHMETIC) / len(ARITHMETIC)
    falls = [after - before for before, after in itertools.pairwise(points[1:])]  # 0 is the switch, not a budget
    return [
        ("four-digit addition, thinking", think["add4"], 0.95),
        ("four-digit subtraction, thinking", think["subtract4"], 0.95),
        ("all tasks, thinking", think["all"], 0.85),
        ("arithmetic, what thinking adds", gap, 0.10),
        ("tool turns right", think["tool"], 0.95),
        ("tool calls well-formed", result["well_formed_tool_calls"]["think"], 0.95),
        ("memory, thinking", think["memory"], 0.95),
        ("memory, no thinking", direct["memory"], 0.95),
        ("what the largest budget adds to the smallest", points[-2] - points[1], 0.10),
        ("worst change from one budget to the next", min(falls), -0.02),
        ("largest budget against unlimited", -abs(points[-2] - points[-1]), 0.0),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items-per-task", type=int, default=ITEMS_PER_TASK, metavar="N")
    parser.add_argument("--curve-items-per-task", type=int, default=0, metavar="N", help="default: as many")
    parser.add_argument("--shards", type=int, default=2, metavar="M")
    parser.add_argument("--attention", type=int, default=1, metavar="N")
    parser.add_argument("--concurrency", type=int, default=192, metavar="N", help="streams open at a time")
    parser.add_argument("--out", type=Path, default=Path("served_evaluation.json"))
    parser.add_argument("--svg", type=Path, default=Path("demo-model-curve.svg"))
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="of the cluster, e.g. device=cuda"
    )
    parser.add_argument("--write", action="store_true", help="replace the figures of the model card and the docs")
    options = parser.parse_args()
    if options.write:
        options.out, options.svg = FOLDER / "served_evaluation.json", FOLDER.parents[1] / "docs/demo-model-curve.svg"

    config = demo_config(options.shards, num_attention=options.attention)
    config = override(config, dict(text.split("=", 1) for text in options.set))
    with Cluster(config, progress=say) as cluster, Served(cluster.gateways, concurrency=options.concurrency) as served:
        started = time.monotonic()
        result = report(
            served, options.items_per_task, curve_items_per_task=options.curve_items_per_task,
            parallel=NUM_JOBS, progress=say,
        )  # fmt: skip
        seconds = time.monotonic() - started
        on_gpu = cluster.config.device == "cuda"
    device = (
        f"cpu, {os.cpu_count()} cores, float32" if not on_gpu else f"{torch.cuda.get_device_name(0)}, {config.dtype}"
    )
    result["run"] = {
        "device": device,
        "attention": options.attention,
        "shards": options.shards,
        "streams": options.concurrency,
        "curve_items_per_task": options.curve_items_per_task or options.items_per_task,
        "num_requests": served.num_requests,
        "num_tokens": served.num_tokens,
        "seconds": round(seconds, 1),
    }
    options.out.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    options.svg.write_text(budget_svg(result), encoding="utf-8")
    print(f"{accuracy_table(result)}\n\n{budget_table(result)}\n")
    return judge(result)


def judge(result: dict[str, Any]) -> int:
    """Print each goal and the JSON line; 0 where all are met."""
    missed = []
    for what, measured, least in goals(result):
        met = measured >= least - 1e-9
        print(f"{'met   ' if met else 'MISSED'} {what}: {measured + 0.0:.1%}, goal >= {least:.0%}")
        if not met:
            missed.append(what)
    if result["num_items"] < MIN_ITEMS:
        print(f"a sample: {result['num_items']} items, the evaluation has at least {MIN_ITEMS}")
    line = {
        "evaluation": "demo model, served",
        "num_items": result["num_items"],
        "num_turns": result["num_turns"],
        "accuracy": {mode: shares["all"] for mode, shares in result["accuracy"].items()},
        "budget_curve": [[point["budget"], point["accuracy"]["all"]] for point in result["budget_curve"]],
        "missed": missed,
        **result["run"],
    }
    print(json.dumps(line))
    return 1 if missed else 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
