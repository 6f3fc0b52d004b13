"""How fast does a cluster answer? Loads in open and closed loop against its gRPC gateways, from client processes.

    python -P -m expertmesh.bench.serve --mix fixed poisson thinking turns          # a small MoE, started for it
    python -P -m expertmesh.bench.serve --address HOST:PORT --mix poisson --rate 2 4 8 --requests 200 --svg load.svg
    python -P -m expertmesh.bench.serve --model DIR --set device=cuda --set layout=colocated --streams 128 \\
        --prompt-tokens 128 --output-tokens 128

Mixes (`serve_mixes.py`): **fixed** (a closed loop of --streams, all as long; with one round a fixed batch), **poisson**
(an open loop at --rate requests a second), **thinking** (budgets that are spent, then an answer), **turns**
(conversations in sessions; later turns should come from the prefix cache). Several --streams or --rate are runs one
after the other. Figures: `serve_figures.py`; --engine adds what the cluster costs beside its engine alone
(`serve_against.py`). A line of JSON a run, the last line is all of them; --svg draws each run over its time. Exit 1
where a stream failed, is short or too long; never for speed."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from ..config import ClusterConfig, NetworkConfig, from_mapping, override
from .chart import Chart, Panel
from .serve_against import Engine, beside
from .serve_clients import play
from .serve_figures import Objective, figures, panels, percentile, wrong
from .serve_mixes import Mix, fixed, poisson, thinking, turns
from .serve_target import REPORT_S, SMALL_MOE_SHAPE, Target, small_moe, started, steps_of

MIXES = ("fixed", "poisson", "thinking", "turns")
SHOWN_FAULTS = 5


def mixes(arguments: argparse.Namespace) -> Iterator[Mix]:
    """The runs that were asked for. Each has a seed of its own, so that no prompt is in the prefix cache."""
    a, seed = arguments, arguments.seed
    made: list[Callable[[int], Mix]] = []
    for name in a.mix:
        if name == "fixed":
            made += [
                lambda s, n=n: fixed(n, a.prompt_tokens, a.output_tokens, rounds=a.rounds, vocab=a.vocab, seed=s)
                for n in a.streams
            ]
        elif name == "poisson":
            made += [
                lambda s, r=r: poisson(r, a.requests, a.prompt_tokens, a.output_tokens, vocab=a.vocab, seed=s)
                for r in a.rate
            ]
        elif name == "thinking":
            made += [
                lambda s, n=n: thinking(n, a.budget, a.answer_tokens, opened=a.open_thinking, rounds=a.rounds, seed=s)
                for n in a.streams
            ]
        else:
            made += [lambda s, n=n: turns(n, a.turns, a.output_tokens, seed=s) for n in a.streams]
    return (make(seed + i) for i, make in enumerate(made))


def run(mix: Mix, target: Target, arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Panel], list[str]]:
    """One load: its row of figures, its part of the chart, and what must not be."""
    before = steps_of(target.gateways[0])
    begun_s, records = play(mix, target.gateways, arguments.clients)
    time.sleep(REPORT_S)
    steps = steps_of(target.gateways[0]) - before
    objective = Objective(arguments.slo_ttft_ms / 1e3, arguments.slo_tpot_ms / 1e3)
    found = figures(records, begun_s, objective)
    in_gateway = [r.server_ttft_s for r in records if not r.error]
    row = {
        "mix": mix.name,
        **mix.facts,
        **found.as_dict(),
        "server_ttft_ms_p50": round(percentile(in_gateway, 0.5) * 1e3, 2),
        "steps": steps.num_steps,
        "step_ms_mean": round(steps.step_s / steps.num_steps * 1e3, 3) if steps.num_steps else None,
        "exchange_share_of_step": round(steps.exchange_s / steps.step_s, 3) if steps.step_s else None,
    }
    if arguments.engine:
        row |= beside(row, Engine.of(json.loads(Path(arguments.engine).read_text(encoding="utf-8"))))
    title = f"{mix.name} {', '.join(f'{k} {v:g}' for k, v in mix.facts.items())}"
    return row, panels(records, begun_s, title), wrong(records)


def config_of(arguments: argparse.Namespace) -> ClusterConfig:
    """Of the cluster that is started: the file, then --set; later wins."""
    config = ClusterConfig(network=NetworkConfig(gateway_port=0))
    if arguments.config:
        from ..cluster.commands.serve import read_mapping

        config = from_mapping(ClusterConfig, read_mapping(Path(arguments.config)))
    assignments = dict(text.split("=", 1) for text in arguments.set)
    return override(config, {"model": arguments.model, **assignments} if arguments.model else assignments)


def target_of(arguments: argparse.Namespace, stack: ExitStack) -> Target:
    if arguments.address:
        return Target(arguments.address, arguments.device, arguments.shape)
    config = config_of(arguments)
    prepared: AbstractContextManager[ClusterConfig] = nullcontext(config) if config.model else small_moe(config)
    shape = arguments.shape or ("" if config.model else SMALL_MOE_SHAPE)
    return stack.enter_context(started(stack.enter_context(prepared), shape))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = made.add_argument_group("what is measured; by default a small MoE, started for it")
    where.add_argument("--address", nargs="+", default=[], metavar="HOST:PORT", help="gateways that serve already")
    where.add_argument("--model", default="", help="folder of the cluster to start")
    where.add_argument("--config", default="", metavar="FILE", help="YAML or JSON of ClusterConfig fields")
    where.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    where.add_argument("--device", default="", help="how a cluster at --address is called in the report")
    where.add_argument("--shape", default="", help="how the model is called in the report")
    load = made.add_argument_group("load")
    load.add_argument("--mix", nargs="+", choices=MIXES, default=["fixed"])
    load.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32], help="of closed loops; sessions of turns")
    load.add_argument("--rounds", type=int, default=1, help="requests of a stream, one after the other")
    load.add_argument("--rate", type=float, nargs="+", default=[2.0], help="requests a second, open loop")
    load.add_argument("--requests", type=int, default=64, help="of an open loop")
    load.add_argument("--prompt-tokens", type=int, default=64)
    load.add_argument("--output-tokens", type=int, default=64)
    load.add_argument("--budget", type=int, default=128, help="thinking tokens")
    load.add_argument("--answer-tokens", type=int, default=32)
    load.add_argument("--open-thinking", action="store_true", help="prompts end in an open think block (dummy weights)")
    load.add_argument("--turns", type=int, default=4)
    load.add_argument("--vocab", type=int, default=150_000, help="random prompt ids are below it")
    load.add_argument("--seed", type=int, help="default: another one each time, so that no prompt is in a prefix cache")
    load.add_argument("--clients", type=int, default=4, help="client processes")
    load.add_argument("--warm-up", type=int, default=2, metavar="N", help="streams before the first run; 0 = none")
    made.add_argument("--slo-ttft-ms", type=float, default=500.0)
    made.add_argument("--slo-tpot-ms", type=float, default=50.0)
    made.add_argument(
        "--engine", default="", metavar="FILE", help="last line of bench.step on the same model and device"
    )
    made.add_argument("--svg", default="", metavar="FILE")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.seed is None:
        arguments.seed = time.time_ns() % (1 << 31)
    rows, drawn, faults = [], [], []
    with ExitStack() as stack:
        target = target_of(arguments, stack)
        if arguments.warm_up:
            tokens = (arguments.prompt_tokens, arguments.output_tokens)
            play(fixed(arguments.warm_up, *tokens, vocab=arguments.vocab, seed=-1), target.gateways, 1)
        for mix in mixes(arguments):
            row, lines, wrong_here = run(mix, target, arguments)
            print(json.dumps(row), flush=True)
            rows.append(row)
            drawn += lines
            faults += wrong_here
    report: dict[str, Any] = {"bench": "serve", "device": target.device, "shape": target.shape, "rows": rows}
    report |= {
        "clients": arguments.clients,
        "seed": arguments.seed,
        "ready_s": round(target.ready_s, 1),
        "phases": target.phases,
    }
    report |= {"slo_ttft_ms": arguments.slo_ttft_ms, "slo_tpot_ms": arguments.slo_tpot_ms, "faults": len(faults)}
    if arguments.svg:
        title = f"expertmesh, {target.shape}, {target.device}"
        Path(arguments.svg).write_text(Chart(title, drawn).svg(), encoding="utf-8")
    for fault in faults[:SHOWN_FAULTS]:
        print(fault, file=sys.stderr)
    print(json.dumps(report))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
