"""`make bench-elastic`: the load goes 1 -> 64 -> 1 streams, the expert tier follows by itself, 2 -> 4 -> 2 shards.

On a host with few cores more shards cannot compute more, so the rows' time is a **cost model** there: a shard waits
`--row-us` for each row that it computes, on a timer that holds no core (`CostModelShard`). Everything else is real:
Ray Serve, the policy, the processes that start and drain, the placement, the exchange. `--row-us 0` leaves it out.

    python -P -m expertmesh.bench.elastic [--row-us 100] [--model FOLDER] [--out docs/elastic.svg]

`--fixed` measures the same load beforehand on clusters of 2 and of 4 shards that stay as they are: what growth could
gain at best, and how busy the shards are at either load. `--target-busy 0` lies between these two (`target_between`):
they differ from host to host. `--gain X` wants 4 shards to give X times the tokens of 2 within the elastic run.

Exits 1 where a stream failed or said other tokens, the tier did not follow or a wanted gain was not reached; goals
(decision to serving <= 10 s, longest stall by a switch <= 2 steps) are reported. The last line is one JSON object."""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..cluster import app
from ..cluster.app import Cluster
from ..cluster.commands.serve import DEMO_MODEL
from ..config import AutoscalingConfig, CacheConfig, ClusterConfig, NetworkConfig
from ..errors import ConfigError
from ..experts import worker
from ..experts.mlp import LocalExpertMLP
from ..experts.worker import ExpertShard
from .chart import Chart, Panel
from .elastic_load import (
    Load,
    Phases,
    Watch,
    mean_busy,
    measure,
    per_second,
    say,
    seconds_with,
    starts,
    switches,
    throughput,
    undisturbed,
)

FEW, MANY = 2, 4  # shards
PHASES = ((1, 15.0), (64, 60.0), (1, 60.0))
FIXED_PHASES = ((1, 9.0), (64, 20.0))
GOAL_SERVING_S, GOAL_STALL_STEPS = 10.0, 2.0
ROW_US_VARIABLE = "EXPERTMESH_BENCH_ROW_US"


def use_cost_model(row_us: float) -> None:
    """Clusters that this process starts have shards of the cost model."""
    os.environ[ROW_US_VARIABLE] = str(row_us)
    app.ExpertShard = CostModelShard  # type: ignore[assignment, misc]


class CostModelExperts:
    """`LocalExperts` whose rows take a set time more, without a core: what a slower machine's rows would take."""

    def __init__(self, experts: LocalExpertMLP, row_s: float) -> None:
        self._experts, self._row_s = experts, row_s

    def forward(self, layer_id: int, rows: torch.Tensor, slot_ids: torch.Tensor) -> torch.Tensor:
        out = self._experts.forward(layer_id, rows, slot_ids)
        time.sleep(self._row_s * int((slot_ids >= 0).sum()))
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)


class CostModelShard(ExpertShard):
    """An `ExpertShard` whose rows cost what the environment says."""

    async def __init__(self, *arguments: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        row_s, load_experts = 1e-6 * float(os.environ[ROW_US_VARIABLE]), worker.load_experts
        worker.load_experts = lambda *given: CostModelExperts(load_experts(*given), row_s)  # type: ignore[assignment]
        await super().__init__(*arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is served, and when its tier follows."""

    model: Path
    row_us: float
    num_attention: int
    target_busy: float
    upscale_delay_s: float
    phases: Phases


@contextlib.contextmanager
def started(setup: Setup, fewest: int, most: int) -> Iterator[Cluster]:
    """A cluster whose tier has `fewest` shards and may have `most`."""
    scaling = AutoscalingConfig(
        min_expert_shards=fewest,
        max_expert_shards=most,
        target_busy=setup.target_busy,
        upscale_delay_s=setup.upscale_delay_s,
        downscale_delay_s=6.0,
        cooldown_s=3.0,
    )
    config = ClusterConfig(
        model=str(setup.model),
        device="cpu",
        num_attention_replicas=setup.num_attention,
        num_expert_shards=fewest,
        network=NetworkConfig(gateway_port=0),
        cache=CacheConfig(kv_memory_bytes=128 << 20),
        autoscaling=scaling if most > fewest else AutoscalingConfig(),
    )
    with Cluster(config, progress=say) as cluster:
        yield cluster


@dataclass(frozen=True, slots=True)
class Fixed:
    """A cluster that stays as it is, under `FIXED_PHASES`."""

    shards: int
    tokens_per_s: float  # many streams
    busy_one: float  # mean of the shards, one stream
    busy_many: float
    failures: tuple[str, ...]


def measure_fixed(setup: Setup, shards: int) -> Fixed:
    with started(setup, shards, shards) as cluster:
        load, seen = asyncio.run(measure(cluster, FIXED_PHASES, shards))
    one, many = (mean_busy(FIXED_PHASES, seen, shards, streams) for streams, _ in FIXED_PHASES)
    tokens_per_s = round(throughput(load, seen, shards), 1)
    made = Fixed(shards, tokens_per_s, round(one, 3), round(many, 3), tuple(load.failures[:3]))
    say(f"{shards} shards, fixed: {made.tokens_per_s} tokens/s, busy {made.busy_one} at one stream, {made.busy_many}")
    return made


def target_between(busy_one: float, busy_many: float) -> float:
    """The busy fraction to aim at so that FEW shards are enough for one stream and too few for many.

    At least what one stream takes of FEW, and 8 % more: the rest must fit when one of three shards goes, and on three
    steps are shorter. At most two thirds of what many take: then all four shards are asked for at once. Where these two
    cross, the tier grows by one shard after the other."""
    least, most = 1.08 * busy_one, 0.98 * busy_many * FEW / (MANY - 1)
    if busy_many < 1.5 * busy_one or not 0 < least < 1:
        raise ConfigError(
            "--target-busy", 0, f"a number: {FEW} shards are busy {busy_one} at one stream, {busy_many} at many"
        )
    return round((least + most) / 2 if least < most else least, 3)


def main() -> int:
    arguments = parse()
    setup = Setup(
        model=arguments.model,
        row_us=arguments.row_us,
        num_attention=arguments.attention,
        target_busy=arguments.target_busy or 0.5,
        upscale_delay_s=arguments.upscale_delay,
        phases=arguments.phases,
    )
    if setup.row_us:
        use_cost_model(setup.row_us)
    fixed = [measure_fixed(setup, shards) for shards in (FEW, MANY)] if arguments.fixed else []
    if not arguments.target_busy:
        setup = replace(setup, target_busy=target_between(fixed[0].busy_one, fixed[0].busy_many))
        say(f"target busy {setup.target_busy}")
    with started(setup, FEW, MANY) as cluster:
        load, seen = asyncio.run(measure(cluster, setup.phases, FEW))
    changes, added = switches(load, seen), starts(seen)
    figures = figures_of(setup, load, seen) | {
        "starts_s": added,
        "switches": changes,
        "longest_stall_steps": max((c["steps"] for c in changes), default=None),
        "longest_stall_excess_steps": max((c["excess_steps"] for c in changes), default=None),
        "wait_steps_without_a_switch": undisturbed(load, seen),
    }
    if fixed:
        gain = round(fixed[1].tokens_per_s / fixed[0].tokens_per_s, 3)
        figures |= {"fixed": [{k: getattr(f, k) for k in f.__slots__} for f in fixed], "fixed_gain": gain}
    arguments.out.write_text(chart(setup, load, seen).svg())
    wrong = [*load.failures[:5], *(failure for f in fixed for failure in f.failures)]
    if figures["shards"] != [FEW, MANY, FEW]:
        went = " -> ".join(str(n) for n in figures["shards"])
        wrong.append(f"the tier went {went} shards, {FEW} -> {MANY} -> {FEW} wanted")
    if figures["gain"] < arguments.gain:
        wrong.append(f"{MANY} shards gave {figures['gain']} times the tokens of {FEW}, {arguments.gain} wanted")
    for line in wrong:
        say(f"FALLS SHORT: {line}")
    for line in goals_missed(added, changes):
        say(f"goal missed: {line}")
    print(json.dumps(figures), flush=True)
    return 1 if wrong else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row-us", type=float, default=100.0, help="cost model: time of a row, 0 = none")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="served on the CPU whatever the host has")
    parser.add_argument("--attention", type=int, default=1, help="attention replicas")
    parser.add_argument("--target-busy", type=float, default=0.5, help="0 = by what --fixed measures")
    parser.add_argument("--upscale-delay", type=float, default=1.0, help="seconds of too much load before growth")
    parser.add_argument(
        "--phases", type=phases_of, default=PHASES, help="STREAMS:SECONDS,...; the first fits two shards"
    )
    parser.add_argument("--fixed", action="store_true", help="clusters of 2 and 4 shards too, that stay as they are")
    parser.add_argument("--gain", type=float, default=0.0, help="tokens/s of 4 shards / of 2, at least")
    parser.add_argument("--out", type=Path, default=Path("elastic.svg"))
    arguments = parser.parse_args()
    if not arguments.target_busy and not arguments.fixed:
        parser.error("--target-busy 0 needs --fixed")
    return arguments


def phases_of(text: str) -> Phases:
    """`1:15,64:60,1:60`."""
    pairs = [part.split(":") for part in text.split(",")]
    return tuple((int(streams), float(seconds)) for streams, seconds in pairs)


def figures_of(setup: Setup, load: Load, seen: Watch) -> dict[str, Any]:
    most_streams = max(streams for streams, _ in setup.phases)
    counts = range(FEW, MANY + 1)
    tokens_per_s = {n: throughput(load, seen, n) for n in counts}
    return {
        "model": setup.model.name,
        "cpus": len(os.sched_getaffinity(0)),
        "attention_replicas": setup.num_attention,
        "cost_model_row_us": setup.row_us,
        "target_busy": setup.target_busy,
        "streams": load.num_done,
        "failures": load.failures[:5],
        "shards": [FEW, int(max(n for _, n in seen.shards)), int(seen.shards[-1][1])],
        "tokens_per_s": {str(n): round(tokens_per_s[n], 1) for n in counts},
        "measured_s": {str(n): round(seconds_with(setup.phases, seen, n), 1) for n in counts},
        "busy": {str(n): round(mean_busy(setup.phases, seen, n, most_streams), 3) for n in counts},
        "gain": round(tokens_per_s[MANY] / tokens_per_s[FEW], 3) if tokens_per_s[FEW] else 0.0,
    }


def chart(setup: Setup, load: Load, seen: Watch) -> Chart:
    counts, p99 = per_second(load)
    name = "demo model" if setup.model == DEMO_MODEL else setup.model.name
    course = " → ".join(str(streams) for streams, _ in setup.phases)
    rows = (
        f"rows cost {setup.row_us:.0f} us more (cost model)"
        if setup.row_us
        else f"{len(os.sched_getaffinity(0))} cores, no cost model"
    )
    return Chart(
        f"Load {course} streams, {name}; {rows}",
        [
            Panel("tokens per second", {"tokens": counts}),
            Panel("p99 inter-token time of each second, ms", {"p99": p99}),
            Panel("shards that serve", {"shards": seen.shards}, steps=True),
            Panel("mean busy fraction of the shards", {"busy": seen.busy}),
        ],
        [(at, text) for at, text in seen.decisions if at >= 0],
    )


def goals_missed(added: Sequence[dict[str, Any]], changes: Sequence[dict[str, float]]) -> list[str]:
    missed = [
        f"{a['shard']} served {a['serving']} s after the decision, goal {GOAL_SERVING_S} s"
        for a in added
        if a["serving"] > GOAL_SERVING_S
    ]
    stalls = [c for c in changes if c["steps"] > GOAL_STALL_STEPS]
    return missed + [
        f"a stall of {c['steps']} steps at {c['at_s']} s, {c['excess_steps']} more than without a switch, "
        f"goal {GOAL_STALL_STEPS}"
        for c in stalls
    ]


if __name__ == "__main__":
    sys.exit(main())
