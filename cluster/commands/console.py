"""What the terminal shows: a streamed turn, a chat of many turns, a table of the cluster. `cli.py` parses and calls.

Thinking is dimmed where the terminal knows how (not when piped, not with NO_COLOR). Ctrl-C during a turn cancels that
turn: its work ends within a step and it is not recorded; at the prompt it leaves the chat."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TextIO

from ...errors import ExpertMeshError
from ...proto import expertmesh_pb2 as pb
from ...router.client.blocking import Client, Session, Stream
from ...router.client.events import AnswerDelta, Event, Finished, ReasoningDelta, ToolCallDelta
from ...router.client.requests import GenerateOptions
from ...router.gateway.tls import ClientTls

SHOWN_DECISIONS = 8
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
HELP = "/new starts another conversation, /exit or Ctrl-D leaves, /think and /no_think act inside a message"


class TurnPrinter:
    """Writes a turn's events as they come."""

    def __init__(self, out: TextIO, *, color: bool | None = None) -> None:
        self._out = out
        self._color = out.isatty() and "NO_COLOR" not in os.environ if color is None else color
        self._thinking = False

    def show(self, event: Event) -> None:
        match event:
            case ReasoningDelta(text=text):
                self._switch(True)
                self._write(text)
            case AnswerDelta(text=text):
                self._switch(False)
                self._write(text)
            case ToolCallDelta(name=name, arguments_text=text):
                self._switch(False)
                self._write(f"\n[{name}] {text}" if name else text)
            case Finished():
                self._switch(False)
                self._write("\n")

    def _switch(self, thinking: bool) -> None:
        if thinking == self._thinking:
            return
        self._thinking = thinking
        if self._color:
            self._write(DIM if thinking else PLAIN)
        else:
            self._write("<think>\n" if thinking else "\n</think>\n\n")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def summary_of(finished: Finished) -> str:
    """`17 in (12 cached), 40 out (30 thinking), first token 0.05 s, 0.9 s`."""
    cached = f" ({finished.cached_tokens} cached)" if finished.cached_tokens else ""
    thinking = f" ({finished.reasoning_tokens} thinking)" if finished.reasoning_tokens else ""
    return (
        f"{finished.prompt_tokens} in{cached}, {finished.completion_tokens} out{thinking}, "
        f"first token {finished.time_to_first_token_s:.3f} s, {finished.total_s:.2f} s, {finished.reason.name.lower()}"
    )


def run_turn(stream: Stream, printer: TurnPrinter) -> Finished | None:
    """Print a stream to its end; None = cancelled by Ctrl-C."""
    try:
        for event in stream:
            printer.show(event)
    except KeyboardInterrupt:
        with contextlib.suppress(ExpertMeshError):  # it has ended, or its gateway
            stream.cancel()
        stream.close()
        return None
    return stream.finished


def chat(client: Client, session: Session, options: GenerateOptions, *, out: TextIO, err: TextIO) -> int:
    """Read lines, stream turns, until the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing in input()
    print(f"session {session.session_id}. {HELP}", file=err)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=err)
            return 0
        if line in ("/exit", "/quit"):
            return 0
        if line == "/new":
            session = client.session()
            print(f"session {session.session_id}", file=err)
            continue
        if not line:
            continue
        try:
            finished = run_turn(session.send(line, **options), TurnPrinter(out))
        except ExpertMeshError as error:  # a turn that fails does not end the chat
            print(f"{type(error).__name__}: {error}", file=err)
            continue
        print(f"[{summary_of(finished)}]" if finished else "\n[cancelled]", file=err)


def generate(stream: Stream, *, as_json: bool, out: TextIO, err: TextIO) -> int:
    """One answer: streamed to `out`, or one JSON object."""
    if as_json:
        text: dict[str, str] = {"reasoning": "", "answer": ""}
        for event in stream:
            if isinstance(event, ReasoningDelta):
                text["reasoning"] += event.text
            elif isinstance(event, AnswerDelta):
                text["answer"] += event.text
        print(json.dumps(text | _finished_as_dict(stream.finished), ensure_ascii=False), file=out)
        return 0
    finished = run_turn(stream, TurnPrinter(out))
    print(f"[{summary_of(finished)}]" if finished else "\n[cancelled]", file=err)
    return 0 if finished else 130


def _finished_as_dict(finished: Finished | None) -> dict[str, Any]:
    assert finished is not None, "a stream ends with its finished event"
    names = (
        "prompt_tokens",
        "cached_tokens",
        "completion_tokens",
        "reasoning_tokens",
        "time_to_first_token_s",
        "total_s",
    )
    return {"finish_reason": finished.reason.name.lower()} | {name: getattr(finished, name) for name in names}


# ---------------------------------------------------------------- status


def topology_as_dict(topology: pb.Topology, health: dict[str, str]) -> dict[str, Any]:
    return as_dict(topology) | {"health": health}


def as_dict(message: Any) -> dict[str, Any]:
    """Every field by its name in the .proto, numbers as numbers (protobuf's own JSON makes 64-bit ones strings)."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            found[field.name] = [as_dict(v) for v in value] if field.message_type else list(value)
        elif not field.has_presence or message.HasField(field.name):
            found[field.name] = as_dict(value) if field.message_type else value
    return found


def topology_line(topology: pb.Topology) -> str:
    """`demo: 1 gateway, 1 attention, 2 expert shards, 64 experts in 6 layers, disaggregated, epoch 1, placement 1`."""
    attention = sum(m.attention and not m.expert for m in topology.members)
    experts = sum(m.expert and not m.attention for m in topology.members)
    both = sum(m.expert and m.attention for m in topology.members)
    parts = [f"{len(topology.gateways)} gateway"]
    parts += [
        f"{n} {name}" for n, name in ((attention, "attention"), (experts, "expert shards"), (both, "colocated")) if n
    ]
    if topology.num_logical_experts:
        parts.append(f"{topology.num_logical_experts} experts in {topology.num_moe_layers} layers")
    parts += [topology.layout, f"epoch {topology.epoch}", f"placement {topology.placement_version}"]
    return f"{topology.model}: {', '.join(parts)}"


def status_table(topology: pb.Topology, health: dict[str, str]) -> str:
    """The cluster for people."""
    lines = [topology_line(topology)]
    lines += [f"gateway {address:<24} {state}" for address, state in health.items()]
    if not topology.members:
        lines.append(
            "from another host, members are shown with the cluster token: --token or EXPERTMESH_NETWORK__CLUSTER_TOKEN"
        )
        return "\n".join(lines)
    head = ("member", "state", "ep", "pid", "node", "run", "wait", "KV used", "experts", "rows", "busy", "weights")
    rows = [head, *(_member_row(m) for m in topology.members)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"faults at {m.member_id}: {m.faults}" for m in topology.members if m.faults]
    for decision in topology.decisions[-SHOWN_DECISIONS:]:
        lines.append(f"{datetime.fromtimestamp(decision.at, UTC):%H:%M:%S} UTC  {decision.text}")
    return "\n".join(lines)


def _member_row(m: pb.MemberStatus) -> tuple[str, ...]:
    used = m.num_kv_blocks - m.num_free_kv_blocks
    attention = (str(m.num_running), str(m.num_waiting), f"{used}/{m.num_kv_blocks}") if m.attention else ("-",) * 3
    expert = ("-",) * 4
    if m.expert:
        busy, weights = f"{100 * m.busy_fraction:.0f} %", f"{m.weight_bytes / 1e6:,.1f} MB"
        expert = (str(m.num_physical_experts), str(m.num_rows), busy, weights)
    rank = str(m.ep_rank) if m.ep_rank >= 0 else "-"
    return m.member_id, m.state, rank, str(m.pid), m.node, *attention, *expert


def gateway_health(address: str, timeout_s: float = 3.0, *, tls: ClientTls | None = None) -> str:
    """grpc.health.v1's word on one gateway: SERVING, NOT_SERVING, or why there is none."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    connect = tls.connector(grpc.secure_channel) if tls else grpc.insecure_channel
    with connect(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


class Stopwatch:
    """Progress lines of long work: at most one every `interval_s`."""

    def __init__(self, write: Callable[[str], None], interval_s: float = 0.5) -> None:
        self._write, self._interval_s, self._last = write, interval_s, 0.0

    def show(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - self._last >= self._interval_s:
            self._last = now
            self._write(f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB ({100 * done / max(1, total):.0f} %)")
