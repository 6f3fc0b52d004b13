"""`make demo`: a real local cluster, one fixed conversation of four turns streamed over gRPC, then everything stopped.

One gateway, one attention replica, two expert shards over gloo, an embedded Redis. The model is the small one trained
for this repository where its weights are there; else a seeded random checkpoint, and the demo says that its text is
noise. Nothing is canned: the model says what it says; the calculator that the last turn calls runs here. Exit code 1
where a stream does not finish, a turn is not recorded, a later turn finds nothing of the conversation in the prefix
cache, or the trained model's answer is wrong."""

import argparse
import json
import operator
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..client import AnswerDelta, Client, Finished, Messages, Session, ToolCallDelta
from ..cluster.commands.console import TurnPrinter, gateway_health, status_table, summary_of, topology_line
from ..config import CacheConfig, ClusterConfig, NetworkConfig, SchedulerConfig
from ..errors import ExpertMeshError
from ..request import FinishReason
from .demo_model.tools import CALCULATOR

DEMO_MODEL = Path(__file__).parent / "demo_model" / "checkpoint"
# Each turn: what the user says, the mode of thinking, and what a right answer holds.
CONVERSATION: tuple[tuple[str, str, str], ...] = (
    ("My name is Emma. I live in Paris.", "off", "Emma"),
    ("What is 17 + 25?", "on", "42"),
    ("Where do I live? /no_think", "", "Paris"),
    ("Use the calculator to compute 4821 * 37.", "", "178377"),
)
MAX_TOKENS = 192
GOOD_ENDS = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.TOOL_CALLS)
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


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
        turns = converse(client.session(), must_be_right=model == str(DEMO_MODEL))
        check(turns, client)
        health = {address: gateway_health(address) for address in topology.gateways}
        print("\n" + status_table(client.topology(), health), flush=True)
        stopping = time.monotonic()
    say(f"stopped in {time.monotonic() - stopping:.1f} s")
    return turns


@dataclass(slots=True)
class Reply:
    finished: Finished
    text: str = ""
    call: str = ""  # the arguments of the one tool, as JSON text


def converse(session: Session, *, must_be_right: bool) -> list[Finished]:
    """Stream the turns; thinking is shown, a call of the calculator is run and its result sent."""
    finished: list[Finished] = []
    for text, mode, right in CONVERSATION:
        print(f"\n> {text}" + (f"   [thinking {mode}]" if mode else ""), flush=True)
        reply = stream(session, text, mode)
        finished.append(reply.finished)
        if reply.call:
            result = calculate(reply.call)
            print(f"\n> [calculator] {result}", flush=True)
            reply = stream(session, [{"role": "tool", "content": result}], mode)
            finished.append(reply.finished)
        if must_be_right and right not in reply.text:
            raise DemoFailed(f"the answer to {text!r} is {reply.text!r}; {right!r} was expected in it")
    if must_be_right and len(finished) != len(CONVERSATION) + 1:
        raise DemoFailed(f"{len(finished) - len(CONVERSATION)} turns called the calculator, expected 1")
    return finished


def stream(session: Session, messages: Messages, mode: str) -> Reply:
    """One reply, shown as it comes."""
    events = session.send(
        messages, thinking=mode or None, tools=[CALCULATOR], max_tokens=MAX_TOKENS, seed=11, timeout_s=60.0
    )
    printer, text, call = TurnPrinter(sys.stdout), "", ""
    for event in events:
        printer.show(event)
        match event:
            case AnswerDelta():
                text += event.text
            case ToolCallDelta(index=0):
                call = "" if event.malformed else call + event.arguments_text
    if events.finished is None:
        raise DemoFailed(f"the stream of request {events.request_id} broke off")
    print(f"[{summary_of(events.finished)}]", flush=True)
    return Reply(events.finished, text, call)


def calculate(arguments_json: str) -> str:
    """The tool: two whole numbers and a sign."""
    expression = str(json.loads(arguments_json).get("expression", ""))
    found = re.fullmatch(r"\s*(-?\d+)\s*([-+*])\s*(-?\d+)\s*", expression)
    return str(SIGNS[found[2]](int(found[1]), int(found[3]))) if found else "not an expression"


def check(turns: Sequence[Finished], client: Client) -> None:
    """What the demo promises, whatever the model says."""
    for number, turn in enumerate(turns, start=1):
        if turn.reason not in GOOD_ENDS or not turn.completion_tokens:
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
