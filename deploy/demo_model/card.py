"""Turn the figures of `evaluate.py` into the model card's tables and the budget curve.

`python -P -m expertmesh.deploy.demo_model.card FOLDER` reads the figures there (`evaluation.json`, `expert_loads.json`,
`served_evaluation.json`, `served_equals_offline.json`), writes `curve.svg` and replaces what stands between the markers
in `README.md`; nothing in it is typed by hand."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, MARGIN = 640, 360, 50
COLOURS = ("#444444", "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#bcbd22")


def accuracy_table(evaluation: dict[str, Any]) -> str:
    modes = list(evaluation["accuracy"])
    rows = ["| task | " + " | ".join(modes) + " |", "|---" * (len(modes) + 1) + "|"]
    for task in [*(task for task in evaluation["accuracy"]["think"] if task != "all"), "all"]:
        rows.append(f"| {task} | " + " | ".join(_percent(evaluation["accuracy"][mode][task]) for mode in modes) + " |")
    rows.append("| tokens a turn | " + " | ".join(str(evaluation["mean_tokens"][mode]) for mode in modes) + " |")
    formed = evaluation["well_formed_tool_calls"]
    rows.append("| tool calls well-formed | " + " | ".join(_percent(formed[mode]) for mode in modes) + " |")
    return "\n".join(rows)


def budget_table(evaluation: dict[str, Any]) -> str:
    curve = evaluation["budget_curve"]
    rows = [
        "| task | " + " | ".join(_budget(point["budget"]) for point in curve) + " |",
        "|---" * (len(curve) + 1) + "|",
    ]
    for task in [*(task for task in curve[0]["accuracy"] if task != "all"), "all"]:
        rows.append(f"| {task} | " + " | ".join(_percent(point["accuracy"][task]) for point in curve) + " |")
    return "\n".join(rows)


def served_section(served: dict[str, Any]) -> str:
    """What a cluster got right, and how it was run."""
    run, points = served["run"], served["budget_curve"]
    budgets = "| budget | " + " | ".join(_budget(point["budget"]) for point in points) + " |"
    shares = "| right | " + " | ".join(_percent(point["accuracy"]["all"]) for point in points) + " |"
    lines = [
        f"{served['num_items']} conversations ({served['num_turns']} scored turns) in each mode, "
        f"{run['curve_items_per_task'] * (len(points[0]['accuracy']) - 1)} for each budget: {run['num_requests']:,} "
        f"requests, {run['num_tokens']:,} generated tokens in {run['seconds']:.0f} s, up to {run['streams']} streams "
        f"at a time, {run['attention']} attention replica, {run['shards']} expert shards, {run['device']}.",
        "",
        accuracy_table(served),
        "",
        budgets,
        "|---" * (len(points) + 1) + "|",
        shares,
    ]
    return "\n".join(lines)


def identity_table(identity: dict[str, Any]) -> str:
    """Conversations that are by the token what transformers makes of them."""
    rows = ["| shards | conversations | identical | parted at a tie | different | tokens |", "|---" * 6 + "|"]
    for row in identity["rows"]:
        cells = (row["shards"], row["of"], row["identical"], row["tied"], row["different"], f"{row['tokens']:,}")
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    least = identity["reference_margin_min"]
    rows += ["", f"The smallest lead of a best logit over the second was {least:.2g} ({identity['device']})."]
    return "\n".join(rows)


def loads_table(loads: dict[str, Any]) -> str:
    """Per layer and task: the busiest and the idlest expert's tokens over the mean."""
    tasks = loads["loads"]
    layers = range(len(next(iter(tasks.values()))))
    rows = ["| task | " + " | ".join(f"layer {layer}" for layer in layers) + " |", "|---" * (len(layers) + 1) + "|"]
    summed = [[sum(tasks[task][layer][e] for task in tasks) for e in range(len(tasks["add"][0]))] for layer in layers]
    for task, counts in [*tasks.items(), ("all", summed)]:
        cells = [f"{max(c) * len(c) / sum(c):.2f} / {min(c) * len(c) / sum(c):.2f}" for c in counts]
        rows.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def histogram(loads: dict[str, Any]) -> str:
    """Tokens per expert and layer over all tasks, one character an expert, 8 levels up to the busiest."""
    tasks, lines = loads["loads"], []
    for layer in range(len(tasks["add"])):
        counts = [sum(task[layer][e] for task in tasks.values()) for e in range(len(tasks["add"][layer]))]
        bars = "".join("▁▂▃▄▅▆▇█"[min(7, 8 * count // (max(counts) + 1))] for count in counts)
        lines.append(f"layer {layer}  {bars}")
    return "```\n" + "\n".join(lines) + "\n```"


def budget_svg(evaluation: dict[str, Any]) -> str:
    curve = evaluation["budget_curve"]
    step = (WIDTH - 2 * MARGIN - 110) / (len(curve) - 1)

    def point(index: int, value: float) -> tuple[float, float]:
        return MARGIN + index * step, HEIGHT - MARGIN - value * (HEIGHT - 2 * MARGIN)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        ' font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{MARGIN}" y="24" font-size="14">Accuracy against thinking budget (tokens), held-out set</text>',
    ]
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = point(0, value)
        right = point(len(curve) - 1, value)[0]
        parts.append(f'<path d="M{x:.0f} {y:.0f}H{right:.0f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x - 8:.0f}" y="{y + 4:.0f}" text-anchor="end">{value:.0%}</text>')
    for index, entry in enumerate(curve):
        x, y = point(index, 0)
        parts.append(f'<text x="{x:.0f}" y="{y + 18:.0f}" text-anchor="middle">{_budget(entry["budget"])}</text>')
    for number, task in enumerate(["all", *(task for task in curve[0]["accuracy"] if task != "all")]):
        places = [point(index, entry["accuracy"][task]) for index, entry in enumerate(curve)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        colour, width = COLOURS[number % len(COLOURS)], 3 if task == "all" else 1.2
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        parts.append(f'<text x="{WIDTH - MARGIN - 90}" y="{70 + 18 * number}" fill="{colour}">{task}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _budget(value: int | None) -> str:
    return "unlimited" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    evaluation, loads, served, identity = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("evaluation", "expert_loads", "served_evaluation", "served_equals_offline")
    )
    text = (folder / "README.md").read_text(encoding="utf-8")
    parts = {
        "accuracy": accuracy_table(evaluation), "budget": budget_table(evaluation), "loads": loads_table(loads),
        "histogram": histogram(loads), "served": served_section(served), "identity": identity_table(identity),
    }  # fmt: skip
    for name, table in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        text = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{table}\n{end}", text, flags=re.DOTALL)  # noqa: B023
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "curve.svg").write_text(budget_svg(evaluation), encoding="utf-8")


if __name__ == "__main__":
    main()
