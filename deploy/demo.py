"""`make demo`: a real local cluster, one fixed conversation of three turns streamed over gRPC, then everything stopped.

One gateway, one attention replica, two expert shards over gloo, an embedded Redis. The model is the small one trained
for this repository where its weights are there; else a seeded random checkpoint, and the demo says that its text is
noise. Nothing is canned: the answers are whatever the model says. Exit code 1 where a stream does not finish, a turn is
not recorded, or a later turn finds nothing of the conversation in the prefix cache."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..client import Client, Finished, Session
from ..config import CacheConfig, ClusterConfig, NetworkConfig, SchedulerConfig
from ..console import TurnPrinter, gateway_health, status_table, summary_of, topology_line
from ..errors import ExpertMeshError
from ..request import FinishReason

DEMO_MODEL = Path(__file__).parent / "demo_model" / "checkpoint"
# Each turn: what the user says, and the mode of thinking.
CONVERSATION: tuple[tuple[str, str], ...] = (
    ("My name is Emma. I live in Paris.", "off"),
    ("What is 17 + 25?", "on"),
    ("Where do I live? /no_think", ""),
)
MAX_TOKENS = 192


class DemoFailed(Exception):
    """Something that the demo promises did not hold."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", type=int, default=1, metavar="N", help="attention replicas (default 1)")
    parser.add_argument("--shards", type=int, default=2, metavar="M", help="expert shards (default 2)")
    parser.add_argument("--model", metavar="DIR", help="serve this checkpoint instead")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="expertmesh-demo-") as folder:
            turns = run(checkpoint(arguments.model, Path(folder)), arguments.attention, arguments.shards)
    except (ExpertMeshError, DemoFailed) as error:
        print(f"demo failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    total_s = time.monotonic() - started
    print(f"done in {total_s:.1f} s")
    if arguments.json:
        figures = [asdict(t) | {"reason": t.reason.name.lower()} for t in turns]
        print(json.dumps({"demo": "ok", "total_s": round(total_s, 2), "turns": figures}))
    return 0


def checkpoint(named: str | None, scratch: Path) -> str:
    """The model to serve: the named one, the trained one, or noise."""
    if named:
        return named
    if (DEMO_MODEL / "model.safetensors").exists():
        say(f"model: the small Qwen3-MoE trained for this repository ({DEMO_MODEL})")
        return str(DEMO_MODEL)
    from ..make_checkpoint import make_checkpoint

    say("model: no trained demo model is here, so a random checkpoint is served. ITS TEXT IS NOISE; the route is real.")
    folder = scratch / "random-moe"
    make_checkpoint(folder, "tiny-moe", seed=7)
    return str(folder)


def run(model: str, num_attention: int, num_shards: int) -> list[Finished]:
    from ..cluster.app import Cluster

    config = ClusterConfig(
        model=model,
        served_model_name="demo-moe",
        num_attention_replicas=num_attention,
        num_expert_shards=num_shards,
        network=NetworkConfig(gateway_port=0),
        cache=CacheConfig(kv_memory_bytes=64 << 20),
        scheduler=SchedulerConfig(max_num_seqs=32),
    )
    cluster = Cluster(config, progress=say)
    with cluster, Client(cluster.gateways, cluster_token=cluster.config.network.cluster_token) as client:
        topology = client.topology()
        print(topology_line(topology), flush=True)
        turns = converse(client.session())
        check(turns, client)
        health = {address: gateway_health(address) for address in topology.gateways}
        print("\n" + status_table(client.topology(), health), flush=True)
        stopping = time.monotonic()
    say(f"stopped in {time.monotonic() - stopping:.1f} s")
    return turns


def converse(session: Session) -> list[Finished]:
    """Stream the turns; thinking is shown."""
    finished: list[Finished] = []
    for text, mode in CONVERSATION:
        print(f"\n> {text}" + (f"   [thinking {mode}]" if mode else ""), flush=True)
        stream = session.send(text, thinking=mode or None, max_tokens=MAX_TOKENS, seed=11, timeout_s=60.0)
        printer = TurnPrinter(sys.stdout)
        for event in stream:
            printer.show(event)
        if stream.finished is None:
            raise DemoFailed(f"the stream of turn {len(finished) + 1} broke off")
        print(f"[{summary_of(stream.finished)}]", flush=True)
        finished.append(stream.finished)
    return finished


def check(turns: Sequence[Finished], client: Client) -> None:
    """What the demo promises, whatever the model says."""
    for number, turn in enumerate(turns, start=1):
        if turn.reason not in (FinishReason.STOP, FinishReason.LENGTH) or not turn.completion_tokens:
            raise DemoFailed(f"turn {number} ended with {turn.reason.name} after {turn.completion_tokens} tokens")
        if not turn.committed or turn.session_version != number:
            raise DemoFailed(f"turn {number} is not in the session record (version {turn.session_version})")
        if number > 1 and turn.cached_tokens == 0:
            raise DemoFailed(f"turn {number} found nothing of the conversation in the prefix cache")
    recorded = [len(s.turns) for s in (client.get_session(s.session_id) for s in client.list_sessions())]
    if recorded != [len(turns)]:
        raise DemoFailed(f"the session store has {recorded} turns, expected [{len(turns)}]")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
