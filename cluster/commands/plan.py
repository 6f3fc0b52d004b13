"""`expertmesh plan`: what fits on which GPUs, and the floor of its speed, without a GPU (`cluster/sizing.py`)."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...model_config import ModelConfig
from ..sizing import (
    GIB,
    SHORT_CONTEXT,
    Plan,
    Workload,
    form_of,
    has_zero_points,
    make_plan,
    parse_gpu,
    plans,
    what_would_fit,
)

Shown = Mapping[str, Any]


def add(commands: Any) -> None:
    parser = commands.add_parser("plan", help="what fits on which GPUs, and how fast it can be")
    parser.description = (
        "Weights, KV, shards and the floor of the speed of a model on N GPUs. Exit code 1: does not fit."
    )
    parser.add_argument("config", metavar="CONFIG", help="a config.json, or the folder of a model")
    parser.add_argument("--gpu", default="H100:80", metavar="KIND", help="H100:80, H200:141, or NAME:GIB:GB_S:TFLOPS")
    parser.add_argument("-n", "--num-gpus", type=int, default=1, metavar="N")
    parser.add_argument("--layout", choices=("disaggregated", "colocated"), help="default: all that are possible")
    parser.add_argument("--attention", type=int, metavar="N", help="attention replicas of the disaggregated layout")
    parser.add_argument("--quant", choices=("bf16", "fp8", "int4"), help="form of the experts (default: config.json's)")
    parser.add_argument("--context", type=int, default=32768, help="tokens of the longest sequence")
    parser.add_argument("--batched-tokens", type=int, default=2048, help="scheduler.max_num_batched_tokens")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=plan)


def plan(arguments: argparse.Namespace) -> int:
    path = Path(arguments.config)
    path = path / "config.json" if path.is_dir() else path
    raw = _read(path)
    config, gpu = ModelConfig.from_mapping(raw, file=str(path)), parse_gpu(arguments.gpu)
    if arguments.num_gpus < 1:
        raise ConfigError("-n", arguments.num_gpus, "at least 1")
    form = arguments.quant or form_of(raw)
    zero_points = form == "int4" and has_zero_points(raw)
    workload = Workload(context=arguments.context, num_batched_tokens=arguments.batched_tokens)
    if arguments.attention:
        if not 0 < arguments.attention < arguments.num_gpus:
            raise ConfigError("--attention", arguments.attention, f"1 to {arguments.num_gpus - 1} of the GPUs")
        found = [
            make_plan(
                config,
                gpu,
                layout="disaggregated",
                num_attention=arguments.attention,
                num_shards=arguments.num_gpus - arguments.attention,
                form=form,
                zero_points=zero_points,
                workload=workload,
            )
        ]
    else:
        found = plans(
            config,
            gpu,
            arguments.num_gpus,
            layout=arguments.layout,
            form=form,
            zero_points=zero_points,
            workload=workload,
        )
    ways = []
    if not found[0].fits:
        ways = what_would_fit(config, gpu, layout=arguments.layout, form=form, workload=workload)
    if arguments.json:
        print(json.dumps({"plans": [asdict(p) | {"fits": p.fits} for p in found], "would_fit": ways}))
    else:
        print(
            "\n".join(
                _lines(
                    config, found, ways, workload, name=path.parent.name if path.name == "config.json" else path.stem
                )
            )
        )
    return 0 if found[0].fits else 1


def _lines(config: ModelConfig, found: list[Plan], ways: list[str], workload: Workload, *, name: str) -> list[str]:
    best = found[0]
    num_gpus = best.num_attention if best.layout == "colocated" else best.num_attention + best.num_shards
    experts = f", {best.form} experts" if config.num_experts else ""
    lines = [f"{name}{experts} on {num_gpus} x {best.gpu.name} {best.gpu.memory_bytes // GIB} GiB"]
    if not best.fits:
        lines += [f"  does not fit, {_split(p)}: {problem}" for p in found for problem in p.problems]
        return [*lines, *(f"  would fit: {way}" for way in ways)]
    lines += _processes(config, best, workload)
    lines += _speed(best, workload)
    others = found[1:]
    if others:
        lines += ["", "  all splits               KV tokens   redundant   ms per token at batch " + _batches(best)]
        lines += [_row(p) for p in found]
    if workload.context > config.max_position_embeddings:
        lines.append(f"  the model knows {config.max_position_embeddings:,} positions: more take YaRN (rope_scaling)")
    return lines


def _processes(config: ModelConfig, p: Plan, workload: Workload) -> list[str]:
    lines = [f"  {_split(p)}"]
    weights, reserve = _gb(p.attention_weight_bytes), _gb(p.reserved_bytes)
    kv = f"KV {_gb(p.kv_bytes)} = {p.kv_tokens:,} tokens"
    if p.layout == "colocated":
        mine = f", experts {_gb(p.expert_weight_bytes)}" if p.num_shards else ""
        lines.append(f"  each rank: attention weights {weights}{mine}, reserve {reserve}, {kv}")
    else:
        lines.append(f"  each attention replica: weights {weights}, reserve {reserve}, {kv}")
        lines.append(f"  each expert shard: {_gb(p.expert_weight_bytes)}")
    if p.num_shards:
        more = f"room for {p.num_redundant} redundant ones a layer" if p.num_redundant else "no room for redundant ones"
        lines.append(f"  {p.slots_per_rank} of {config.num_experts} experts a layer on each; {more}")
    lines.append(f"  {p.max_sequences} sequences of {workload.context:,} tokens at once")
    return lines


def _speed(p: Plan, workload: Workload) -> list[str]:
    lines = ["", "  floor of a decode step, ms per token (what is read, once):"]
    for context in dict.fromkeys((SHORT_CONTEXT, workload.context)):
        cells = []
        for floor in (f for f in p.floors if f.context == context):
            holds = floor.batch * context <= p.num_attention * p.kv_tokens
            cells.append(f"batch {floor.batch}: {floor.ms:.2f}" if holds else f"batch {floor.batch}: too much KV")
        lines.append(f"    {context:,} tokens of context: " + ", ".join(cells))
    lines.append(f"  prefill, by arithmetic: at most {p.prefill_tokens_per_s:,.0f} tokens/s")
    if p.return_bytes_per_token:
        there, back = p.dispatch_bytes_per_token, p.return_bytes_per_token
        link_us = 1e6 * (there + back) / p.gpu.link_bytes_per_s
        sent = f"{there / 1e6:.2f} MB to experts, {back / 1e6:.2f} MB back"
        lines.append(f"  exchange a token: {sent} ({link_us:.1f} us of one link)")
    return lines


def _row(p: Plan) -> str:
    split = f"  {_split(p):<24}"
    if not p.fits:
        return f"{split} does not fit"
    short = "  ".join(f"{f.ms:6.2f}" for f in p.floors if f.context == SHORT_CONTEXT)
    return f"{split} {p.num_attention * p.kv_tokens:>10,}   {p.num_redundant:>9}   {short}"


def _split(p: Plan) -> str:
    if p.layout == "colocated":
        return f"{p.num_attention} colocated" if p.num_shards else f"{p.num_attention} replicas"
    return f"{p.num_attention} attention + {p.num_shards} experts"


def _batches(p: Plan) -> str:
    return " / ".join(str(f.batch) for f in p.floors if f.context == SHORT_CONTEXT)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("CONFIG", str(path), f"a readable config.json ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError("CONFIG", str(path), "a config.json with an object")
    return raw
