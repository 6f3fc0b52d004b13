"""The command line: `expertmesh serve | chat | generate | status | make-checkpoint`.

Heavy modules are imported inside the commands, so that `--help` answers at once. What a machine reads goes to stdout,
progress and errors to stderr. Exit codes: 0 done, 1 it failed (one line says why), 2 wrong usage, 130 interrupted."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ClusterConfig, environment_overrides, from_mapping, override
from .errors import ConfigError, ExpertMeshError, InvalidRequest

DEMO_MODEL = Path(__file__).resolve().parent / "deploy" / "demo_model" / "checkpoint"  # what `serve` starts on

if TYPE_CHECKING:
    import threading

    from .client import Client
    from .router.gateway.tls import ClientTls

TOKEN_VARIABLE = "EXPERTMESH_NETWORK__CLUSTER_TOKEN"
DEFAULT_ADDRESS = "127.0.0.1:50051"
EPILOG = """\
examples:
  expertmesh serve --model /models/Qwen3-30B-A3B --attention 2 --shards 4
  expertmesh chat
  expertmesh generate "What is 17 * 23?" --think off
  expertmesh status --json
  expertmesh make-checkpoint --config config.json --out /tmp/tiny
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except (ConfigError, InvalidRequest) as error:
        print(f"expertmesh: {error}", file=sys.stderr)
        return 2
    except ExpertMeshError as error:
        print(f"expertmesh: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `expertmesh generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


# ---------------------------------------------------------------- serve


def serve(arguments: argparse.Namespace) -> int:
    """Start a cluster, say where it listens, run until SIGINT or SIGTERM."""
    config = serve_config(arguments, os.environ)
    from .cluster.app import Cluster

    with _ended_by_signal() as ended:
        cluster = Cluster(config, ray_address=arguments.ray_address, progress=_progress, interrupted=ended.is_set)
        with cluster:
            found = list(cluster.gateways)
            print(json.dumps({"gateways": found}) if arguments.json else " ".join(found), flush=True)
            ended.wait()
            _progress("stopping")
    return 0


@contextlib.contextmanager
def _ended_by_signal() -> "Iterator[threading.Event]":
    """An event that SIGINT and SIGTERM set, so that a cluster is stopped in order from wherever it is."""
    import signal
    import threading

    ended = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: ended.set()) for number in numbers]
    try:
        yield ended
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def serve_config(arguments: argparse.Namespace, environ: dict[str, str] | os._Environ[str]) -> ClusterConfig:
    """Defaults, then the file, then `EXPERTMESH_*`, then flags: later wins."""
    config = ClusterConfig()
    if arguments.config:
        config = from_mapping(ClusterConfig, _read_mapping(Path(arguments.config)))
    config = override(config, environment_overrides(environ))
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
    }
    named = {path: str(value) for path, value in flags.items() if value is not None}
    config = override(config, named | dict(map(_assignment, arguments.set)))
    if not config.model:
        config = replace(config, model=str(DEMO_MODEL), served_model_name=config.served_model_name or "demo-moe")
    return config


def _assignment(text: str) -> tuple[str, str]:
    path, equals, value = text.partition("=")
    if not equals:
        raise ConfigError("--set", text, "section.field=value, for example scheduler.max_num_seqs=64")
    return path, value


def _read_mapping(path: Path) -> dict[str, Any]:
    import yaml  # comes with Ray; JSON is YAML too

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError("--config", str(path), f"a readable JSON or YAML file ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError("--config", str(path), "a mapping of fields")
    return values


# ---------------------------------------------------------------- generate, chat, status


def generate(arguments: argparse.Namespace) -> int:
    """One answer to one prompt, streamed."""
    text = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    from . import console

    options = _generation_options(arguments)
    with _client(arguments) as client:
        if arguments.raw:
            stream = client.generate(prompt=text, **options)
        else:
            stream = client.generate(text, session_id=arguments.session, **options)
        return console.generate(stream, as_json=arguments.json, out=sys.stdout, err=sys.stderr)


def chat(arguments: argparse.Namespace) -> int:
    """A conversation kept by the cluster."""
    from . import console

    with _client(arguments) as client:
        client.topology()  # an address that nobody serves is said now, not after the first line
        session = client.session(arguments.session)
        return console.chat(client, session, _generation_options(arguments), out=sys.stdout, err=sys.stderr)


def status(arguments: argparse.Namespace) -> int:
    """Topology, health, KV and expert load. Exit code 1 where a gateway does not serve."""
    from . import console

    with _client(arguments) as client:
        topology = client.topology()
    tls = _client_tls(arguments)
    health = {address: console.gateway_health(address, tls=tls) for address in topology.gateways}
    if arguments.json:
        print(json.dumps(console.topology_as_dict(topology, health)))
    else:
        print(console.status_table(topology, health))
    return 0 if health and all(state == "SERVING" for state in health.values()) else 1


def _generation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
        "thinking": arguments.think,
        "thinking_budget": arguments.budget,
    }


def _client(arguments: argparse.Namespace) -> "Client":
    from .client import Client

    addresses = [a.strip() for a in arguments.address.split(",") if a.strip()]
    token = getattr(arguments, "token", "") or os.environ.get(TOKEN_VARIABLE, "")
    return Client(addresses, cluster_token=token, tls=_client_tls(arguments))


def _client_tls(arguments: argparse.Namespace) -> "ClientTls | None":
    if not (arguments.tls or arguments.tls_ca or arguments.tls_cert or arguments.tls_key):
        return None
    from .router.gateway.tls import ClientTls

    return ClientTls(ca_file=arguments.tls_ca, cert_file=arguments.tls_cert, key_file=arguments.tls_key)


# ---------------------------------------------------------------- make-checkpoint


def make_checkpoint(arguments: argparse.Namespace) -> int:
    """Write a seeded random checkpoint of any config, for tests and sizing: its text is noise."""
    from .console import Stopwatch
    from .make_checkpoint import PRESETS
    from .make_checkpoint import make_checkpoint as make

    named = arguments.config in PRESETS
    config = arguments.config if named else _read_mapping(Path(arguments.config))
    progress = Stopwatch(_progress).show
    made = make(
        arguments.out,
        config,
        seed=arguments.seed,
        dtype=arguments.dtype,
        tokenizer_folder=arguments.tokenizer or (None if named else _tokenizer_beside(arguments.config)),
        progress=progress,
    )
    if arguments.json:
        print(json.dumps(asdict(made) | {"folder": str(made.folder)}))
    else:
        print(
            f"{made.folder}: {made.num_parameters:,} parameters, {made.num_bytes / 1e6:,.1f} MB, seed {arguments.seed}"
        )
    return 0


def _tokenizer_beside(config_file: str) -> Path | None:
    folder = Path(config_file).parent
    return folder if (folder / "tokenizer.json").exists() else None


# ---------------------------------------------------------------- arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="expertmesh",
        description="A serving cluster for Qwen3 mixture-of-experts models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="start a cluster on a checkpoint folder"))
    _add_generate(commands.add_parser("generate", help="one answer to one prompt"))
    _add_chat(commands.add_parser("chat", help="a conversation, kept by the cluster"))
    _add_status(commands.add_parser("status", help="topology, health, KV and expert load"))
    _add_make_checkpoint(commands.add_parser("make-checkpoint", help="write a seeded random checkpoint"))
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.description = "Start a cluster and serve until Ctrl-C. Ready when it prints the gateways' addresses."
    parser.add_argument(
        "--model", metavar="DIR", help="checkpoint folder in Hugging Face layout (default: the demo model)"
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
    parser.add_argument("--redis-url", metavar="URL", help="default: REDIS_URL, else an embedded server")
    parser.add_argument(
        "--ray-address", metavar="ADDRESS", default="", help='a running Ray ("auto"); default: a local one'
    )
    parser.add_argument("--json", action="store_true", help="print the addresses as JSON")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="any field, e.g. scheduler.max_num_seqs=64"
    )
    parser.set_defaults(run=serve)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Stream one answer to stdout; figures go to stderr."
    parser.add_argument("prompt", help='a user message; "-" reads stdin')
    parser.add_argument("--raw", action="store_true", help="take the prompt as plain text, without the chat template")
    _add_generation_options(parser)
    parser.add_argument("--session", metavar="ID", default="", help="continue this conversation")
    parser.add_argument("--json", action="store_true", help="one JSON object: texts, finish reason, usage, times")
    parser.set_defaults(run=generate)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Chat in the terminal. Ctrl-C cancels the turn, Ctrl-D leaves; /new begins another conversation."
    )
    _add_generation_options(parser)
    parser.add_argument("--session", metavar="ID", default="", help="continue this conversation")
    parser.set_defaults(run=chat)


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show the cluster. Exit code 1 where a gateway does not serve."
    _add_address(parser)
    parser.add_argument(
        "--token", default="", help=f"cluster token, to see the members from another host (default: {TOKEN_VARIABLE})"
    )
    parser.add_argument("--json", action="store_true", help="the topology as JSON")
    parser.set_defaults(run=status)


def _add_make_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write random weights of any Qwen3 configuration. The same seed gives the same files."
    parser.add_argument("--config", required=True, help="a config.json, or a preset: tiny-moe, small-moe, tiny-dense")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder to copy the tokenizer from")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    parser.set_defaults(run=make_checkpoint)


def _add_generation_options(parser: argparse.ArgumentParser) -> None:
    _add_address(parser)
    parser.add_argument("--max-tokens", type=int, metavar="N", help="default: what the context allows")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 = greedy; default: the checkpoint's")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--seed", type=int, metavar="N", help="same seed, same text")
    parser.add_argument("--think", choices=("on", "off"), help="default: the model's own")
    parser.add_argument("--budget", type=int, metavar="N", help="tokens allowed for thinking")


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", default=DEFAULT_ADDRESS, metavar="HOST:PORT", help=f"gateways, comma-separated ({DEFAULT_ADDRESS})"
    )
    parser.add_argument("--tls", action="store_true", help="the gateways speak TLS and have public certificates")
    parser.add_argument("--tls-ca", metavar="FILE", default="", help="the CA (PEM) of the gateways' certificates")
    parser.add_argument("--tls-cert", metavar="FILE", default="", help="own certificate, where gateways ask for one")
    parser.add_argument("--tls-key", metavar="FILE", default="", help="its key")


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
