"""`expertmesh plan`: what fits on which GPUs, and the floor of its speed, without a GPU (`cluster/sizing.py`)."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import ConfigError


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
    parser.add_argument("--kv-dtype", choices=("bf16", "fp8"), default="bf16", help="cache.kv_dtype")
    parser.add_argument("--batched-tokens", type=int, default=2048, help="scheduler.max_num_batched_tokens")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=plan)


def plan(arguments: argparse.Namespace) -> int:
    from ...model_config import ModelConfig
    from ..plan_report import report
    from ..sizing import Workload, form_of, has_zero_points, make_plan, parse_gpu, plans, what_would_fit

    path = Path(arguments.config)
    path = path / "config.json" if path.is_dir() else path
    raw = _read(path)
    config, gpu = ModelConfig.from_mapping(raw, file=str(path)), parse_gpu(arguments.gpu)
    if arguments.num_gpus < 1:
        raise ConfigError("-n", arguments.num_gpus, "at least 1")
    form = arguments.quant or form_of(raw)
    zero_points = form == "int4" and has_zero_points(raw)
    workload = Workload(
        context=arguments.context,
        num_batched_tokens=arguments.batched_tokens,
        kv_element_bytes=1 if arguments.kv_dtype == "fp8" else 2,
    )
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
        name = path.parent.name if path.name == "config.json" else path.stem
        print("\n".join(report(config, found, ways, workload, name=name)))
    return 0 if found[0].fits else 1


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("CONFIG", str(path), f"a readable config.json ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError("CONFIG", str(path), "a config.json with an object")
    return raw
