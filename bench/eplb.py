"""Placements by `experts/eplb.py` against DeepSeek's published EPLB on the same load windows: balance, moves, time.

`python -P -m expertmesh.bench.eplb`. Every scenario starts from the even placement and plans once a window. Balance is
max / mean of the load model over a window, mean over the windows; moves are expert-layers that a shard must fetch. The
reference's figures are data (`experts/loads/reference.json`), recorded with its own program, which is no part of this
package: `--record PATH_TO/eplb.py` does it anew. It plans without the present placement, so its moves are also given
with its shards renamed, layer by layer, for the fewest moves (exact assignment): the best a caller could do.

The last line is JSON. Exit 1 if a placement lacks an expert or a plan exceeds its moves."""

import argparse
import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from ..experts.eplb import EplbConfig, plan, predict
from ..router.placement import Placement, uniform
from .eplb_loads import LOADS, SCENARIOS, FloatArray, Scenario

BOUND = 500  # moves of one plan in the bounded row
VARIANTS = {
    "exact": EplbConfig(tolerance=0.0, min_gain=0.0001, min_copies=1),  # the reference promises no second copy either
    "default": EplbConfig(),
    f"<= {BOUND} moves": EplbConfig(max_moves=BOUND),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One balancer over the windows of one scenario."""

    max_over_mean: float  # mean over the windows
    worst_layer: float  # of all windows
    next_window: float  # max / mean of each placement over the window after the one it was planned on
    moves: int  # all windows
    moves_renamed: int  # the same, shards renamed for the fewest moves; ours need no renaming
    plan_ms: float  # CPU time of one plan


def even(scenario: Scenario, loads: FloatArray) -> Placement:
    return uniform(loads.shape[0], loads.shape[1], scenario.ep_size, scenario.num_redundant)


def ours(scenario: Scenario, windows: list[FloatArray], config: EplbConfig) -> tuple[Figures, list[str]]:
    config = replace(config, num_redundant=scenario.num_redundant)
    present = even(scenario, windows[0])
    moves, placements, seconds, faults = 0, [], 0.0, []
    for number, loads in enumerate(windows):
        start = time.process_time()
        made = plan(loads, scenario.hosts, config, present=present, version=present.version + 1)
        seconds += time.process_time() - start
        faults += check(made.placement, f"{scenario.name}, window {number}")
        if config.max_moves >= 0 and len(made.moves) > config.max_moves + made.num_forced:
            faults.append(f"{scenario.name}, window {number}: {len(made.moves)} moves, {config.max_moves} allowed")
        if len(made.moves) != (counted := count_moves(present, made.placement)):
            faults.append(f"{scenario.name}, window {number}: {len(made.moves)} moves listed, {counted} made")
        moves, present = moves + len(made.moves), made.placement
        placements.append(made.placement)
    return figures(placements, windows, moves, moves, seconds), faults


def check(placement: Placement, where: str) -> list[str]:
    """Every expert is placed (Placement refuses else), and no rank holds two copies of one."""
    table = np.sort(placement.physical_to_logical.numpy().reshape(placement.num_layers, placement.ep_size, -1), axis=2)
    doubled = (table[:, :, 1:] == table[:, :, :-1]) & (table[:, :, 1:] >= 0)
    return [f"{where}: a shard holds two copies of one expert"] if doubled.any() else []


def count_moves(before: Placement, after: Placement) -> int:
    return int((membership(after) & ~membership(before)).sum())


def membership(placement: Placement) -> np.ndarray:
    """[num_layers, ep_size, num_logical] bool: which shard holds which expert."""
    table = placement.physical_to_logical.numpy().reshape(placement.num_layers, placement.ep_size, -1)
    held = np.zeros((*table.shape[:2], placement.num_logical_experts), dtype=bool)
    layers, ranks, slots = (table >= 0).nonzero()
    held[layers, ranks, table[layers, ranks, slots]] = True
    return held


def figures(
    placements: list[Placement], windows: list[FloatArray], moves: int, moves_renamed: int, seconds: float
) -> Figures:
    """`placements[i]` was planned on `windows[i]`."""
    balances = [predict(placement, loads) for placement, loads in zip(placements, windows)]
    after = [predict(placement, loads) for placement, loads in zip(placements, windows[1:])]
    return Figures(
        max_over_mean=round(float(np.mean([b.max_over_mean for b in balances])), 5),
        worst_layer=round(max(b.worst_layer for b in balances), 4),
        next_window=round(float(np.mean([b.max_over_mean for b in after])), 4),
        moves=moves,
        moves_renamed=moves_renamed,
        plan_ms=round(1e3 * seconds / len(windows), 1),
    )


def dealt(num_layers: int = 4, num_logical: int = 128, top_k: int = 8, num_tokens: int = 25_000) -> dict[str, float]:
    """Zipf 1.2 tokens dealt to the copies as a dispatch deals them (`Placement.map_ids`): the gain counted in rows
    against the gain that the load model predicted from the window before."""
    rng = np.random.RandomState(56)
    popularity = np.arange(1, num_logical + 1) ** -1.2
    logits = np.stack([np.log(rng.permutation(popularity)) for _ in range(num_layers)])
    # top_k distinct experts of every token of every layer (Gumbel): [2 windows, num_layers, num_tokens, top_k]
    noisy = logits[None, :, None] + rng.gumbel(size=(2, num_layers, num_tokens, num_logical)).astype(np.float32)
    ids = np.argpartition(-noisy, top_k, axis=3)[..., :top_k].astype(np.int32)
    loads = np.stack([np.bincount(layer.ravel(), minlength=num_logical) for layer in ids[0]])
    before = uniform(num_layers, num_logical, 8, 32)
    made = plan(loads, ["host"] * 8, EplbConfig(num_redundant=32), present=before)
    key = np.arange(num_tokens)
    totals = []
    for placement in (before, made.placement):
        ranks = [
            placement.map_ids(layer, ids[1, layer], key) // placement.slots_per_rank for layer in range(num_layers)
        ]
        totals.append(sum(int(np.bincount(rank.ravel(), minlength=8).max()) for rank in ranks))
    return {"predicted_gain": round(made.predicted_gain, 4), "dealt_gain": round(totals[0] / totals[1], 4)}


# ---------------------------------------------------------------- the reference


Balancer = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def reference(scenario: Scenario, windows: list[FloatArray], rebalance_experts: Balancer) -> Figures:
    raw = renamed = even(scenario, windows[0])
    num_physical = windows[0].shape[1] + scenario.num_redundant
    placements, moves, moves_renamed, seconds = [], 0, 0, 0.0
    for loads in windows:
        start = time.process_time()
        table, _, _ = rebalance_experts(torch.from_numpy(loads), num_physical, 1, 1, scenario.ep_size)
        seconds += time.process_time() - start
        made = Placement(raw.version + 1, loads.shape[1], scenario.ep_size, table.to(torch.int32))
        moves, raw = moves + count_moves(raw, made), made
        following = rename(renamed, made)
        moves_renamed, renamed = moves_renamed + count_moves(renamed, following), following
        placements.append(made)
    return figures(placements, windows, moves, moves_renamed, seconds)


def rename(before: Placement, after: Placement) -> Placement:
    """`after` with the shards of each layer permuted so that most experts are where they were."""
    overlap = np.einsum("lre,lse->lrs", membership(before).astype(np.int64), membership(after).astype(np.int64))
    table = after.physical_to_logical.numpy().reshape(after.num_layers, after.ep_size, -1).copy()
    for layer in range(after.num_layers):
        table[layer] = table[layer, best_assignment(overlap[layer])]
    flat = torch.from_numpy(table.reshape(after.num_layers, -1))
    return Placement(after.version, after.num_logical_experts, after.ep_size, flat)


def best_assignment(value: np.ndarray) -> list[int]:
    """Column of each row with the largest sum, each column once: dynamic programming over sets of columns."""
    size = len(value)
    sets = np.arange(1 << size)
    count = sum((sets >> j) & 1 for j in range(size))
    best = np.full(1 << size, -1)
    best[0] = 0
    for row in range(size):
        now = sets[count == row]
        for column in range(size):
            free = now[(now >> column) & 1 == 0]
            following = free | (1 << column)
            best[following] = np.maximum(best[following], best[free] + value[row, column])
    columns, left = [], (1 << size) - 1
    for row in reversed(range(size)):
        column = next(j for j in range(size) if left >> j & 1 and best[left & ~(1 << j)] + value[row, j] == best[left])
        columns.append(column)
        left &= ~(1 << column)
    return columns[::-1]


def load_balancer(path: str) -> Balancer:
    spec = importlib.util.spec_from_file_location("reference_eplb", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    balancer: Balancer = module.rebalance_experts
    return balancer


def digest(windows: list[FloatArray]) -> str:
    """A figure belongs to these loads only."""
    return hashlib.sha256(b"".join(w.astype("<i8").tobytes() for w in windows)).hexdigest()[:16]


def record(path: str) -> None:
    balancer, rows = load_balancer(path), {}
    for scenario in SCENARIOS:
        windows = scenario.windows()
        rows[scenario.name] = {"loads": digest(windows), **asdict(reference(scenario, windows, balancer))}
        print(scenario.name, rows[scenario.name], flush=True)
    about = "github.com/deepseek-ai/EPLB, commit d52c72d5, rebalance_experts with num_groups = num_nodes = 1"
    body = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    (LOADS / "reference.json").write_text(f'{{"about": {json.dumps(about)},\n"scenarios": {{\n{body}\n}}}}\n')


# ---------------------------------------------------------------- the table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", metavar="EPLB_PY", help="run this program on the loads and keep its figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.record:
        record(options.record)
    recorded = json.loads((LOADS / "reference.json").read_text())["scenarios"]
    result, faults = {}, []
    columns = f"{'max/mean':>9} {'worst':>7} {'next':>7} {'moves':>6} {'renamed':>7} {'ms':>7}"
    print(f"{'scenario':30} {'placement':16} {columns}")
    for scenario in SCENARIOS:
        windows = scenario.windows()
        start = even(scenario, windows[0])
        rows = {"even": figures([start] * len(windows), windows, 0, 0, 0.0)}
        known = dict(recorded.get(scenario.name, {}))
        if known.pop("loads", "") == digest(windows):
            rows["DeepSeek EPLB"] = Figures(**known)
        for name, config in VARIANTS.items():
            rows[name], found = ours(scenario, windows, config)
            faults += found
        for name, row in rows.items():
            print(
                f"{scenario.name:30} {name:16} {row.max_over_mean:9.5f} {row.worst_layer:7.4f} "
                f"{row.next_window:7.4f} "
                f"{row.moves:6} {row.moves_renamed:7} {row.plan_ms:7.1f}"
            )
        result[scenario.name] = {name: asdict(row) for name, row in rows.items()}
        result[scenario.name]["goal"] = goal(rows)
    gain = dealt()
    print(f"zipf 1.2, 8 shards: rows of the next window on the hottest shards, {gain}")
    for fault in faults:
        print("FAULT", fault)
    print(json.dumps({"scenarios": result, "zipf": gain, "faults": faults}))
    return 1 if faults else 0


def goal(rows: dict[str, Figures]) -> str:
    """Not above the reference's max / mean, with fewer moves than its best case?"""
    if "DeepSeek EPLB" not in rows:
        return "no reference for these loads"
    theirs, own = rows["DeepSeek EPLB"], rows["exact"]
    balance = own.max_over_mean <= theirs.max_over_mean
    moves = own.moves < theirs.moves_renamed
    return (
        "met"
        if balance and moves
        else f"balance {'met' if balance else 'not met'}, moves {'met' if moves else 'not met'}"
    )


if __name__ == "__main__":
    sys.exit(main())
