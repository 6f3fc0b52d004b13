"""`expertmesh serve`: start a cluster, say where it listens, run until SIGINT or SIGTERM; SIGUSR1 = upgrade."""

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...config import ClusterConfig, environment_overrides, from_mapping, override
from ...errors import ConfigError
from .connect import API_KEY_VARIABLE

LOOK_S = 0.5  # between looks at whether an upgrade was asked for
DEMO_MODEL = Path(__file__).resolve().parent.parent.parent / "deploy" / "demo_model" / "checkpoint"  # what it starts on


def add(commands: Any) -> None:
    parser = commands.add_parser("serve", help="start a cluster on a checkpoint folder")
    parser.description = "Start a cluster and serve until Ctrl-C. Ready when it prints the gateways' addresses."
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="folder, URL of a folder, or hub id ORG/NAME[@REVISION] (default: the demo model)",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON of ClusterConfig fields")
    parser.add_argument("--layout", choices=("disaggregated", "colocated"))
    parser.add_argument("--attention", type=int, metavar="N", help="attention replicas (default 1)")
    parser.add_argument("--shards", type=int, metavar="M", help="expert shards (default 2)")
    parser.add_argument("--gateways", type=int, metavar="N", help="gateways (default 1)")
    parser.add_argument("--host", help="address that the gateways bind (default 127.0.0.1)")
    parser.add_argument("--port", type=int, help="first gateway's port (default 50051, 0 = any free one)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"))
    parser.add_argument(
        "--load-format", choices=("auto", "dummy"), help="dummy: seeded noise instead of weights; config.json suffices"
    )
    parser.add_argument("--redis-url", metavar="URL", help="default: REDIS_URL, else an embedded server")
    parser.add_argument(
        "--ray-address", metavar="ADDRESS", default="", help='a running Ray ("auto"); default: a local one'
    )
    parser.add_argument("--json", action="store_true", help="print the addresses as JSON")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="any field, e.g. scheduler.max_num_seqs=64"
    )
    parser.set_defaults(run=serve)


def serve(arguments: argparse.Namespace) -> int:
    config = serve_config(arguments, os.environ)
    from ..app import Cluster

    with _set_by(signal.SIGINT, signal.SIGTERM) as ended, _set_by(signal.SIGUSR1) as renew:
        cluster = Cluster(config, ray_address=arguments.ray_address, progress=_progress, interrupted=ended.is_set)
        with cluster:
            found = list(cluster.gateways)
            print(json.dumps({"gateways": found}) if arguments.json else " ".join(found), flush=True)
            while not ended.wait(LOOK_S):
                if renew.is_set():
                    renew.clear()
                    cluster.upgrade()
            _progress("stopping")
    return 0


def serve_config(arguments: argparse.Namespace, environ: Mapping[str, str]) -> ClusterConfig:
    """Defaults, then the file, then `EXPERTMESH_*`, then flags: later wins."""
    config = ClusterConfig()
    if arguments.config:
        config = from_mapping(ClusterConfig, read_mapping(Path(arguments.config)))
    hub = {"weights.hub_token": environ.get("HF_TOKEN", ""), "weights.hub_endpoint": environ.get("HF_ENDPOINT", "")}
    config = override(config, {path: value for path, value in hub.items() if value})
    fields = {name: value for name, value in environ.items() if name != API_KEY_VARIABLE}  # that is a client's
    config = override(config, environment_overrides(fields))
    flags = {
        "model": arguments.model,
        "layout": arguments.layout,
        "num_gateways": arguments.gateways,
        "num_attention_replicas": arguments.attention,
        "num_expert_shards": arguments.shards,
        "network.gateway_port": arguments.port,
        "network.gateway_host": arguments.host,
        "redis_url": arguments.redis_url,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "weights.load_format": arguments.load_format,
    }
    named = {path: str(value) for path, value in flags.items() if value is not None}
    config = override(config, named | dict(map(_assignment, arguments.set)))
    if not config.model:
        config = replace(config, model=str(DEMO_MODEL), served_model_name=config.served_model_name or "demo-moe")
    return config


def read_mapping(path: Path) -> dict[str, Any]:
    import yaml  # comes with Ray; JSON is YAML too

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError("--config", str(path), f"a readable JSON or YAML file ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError("--config", str(path), "a mapping of fields")
    return values


def _assignment(text: str) -> tuple[str, str]:
    path, equals, value = text.partition("=")
    if not equals:
        raise ConfigError("--set", text, "section.field=value, for example scheduler.max_num_seqs=64")
    return path, value


@contextlib.contextmanager
def _set_by(*numbers: signal.Signals) -> Iterator[threading.Event]:
    """An event that these signals set, so that a cluster is stopped in order from wherever it is."""
    event = threading.Event()
    before = [signal.signal(number, lambda *_: event.set()) for number in numbers]
    try:
        yield event
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
