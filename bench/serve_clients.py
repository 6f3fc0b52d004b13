"""Play the scripts of a load against gateways, from several client processes, and bring back what each request saw.

Why processes: one asyncio client reads some ten thousand messages a second, which is what a gateway sends; with several
the client is not what is measured (`client_lag_ms_p50` shows it if it is). All clocks are the host's monotonic one, so
times of different processes compare. Processes are spawned before the load begins and wait for one common moment."""

import asyncio
import multiprocessing as mp
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import grpc
import grpc.aio

from ..proto import expertmesh_pb2 as pb
from .serve_figures import Record
from .serve_mixes import Ask, Mix, Script, shared_out

METHOD = "/expertmesh.v1.Generation/Generate"
STREAMS_A_CHANNEL = 32  # a TCP connection each
HEAD_START_S = 0.3  # between the word to begin and the first request
TIMEOUT_S = 600.0  # of one request

Numbered = Sequence[tuple[int, Script]]


def play(mix: Mix, gateways: Sequence[str], num_processes: int) -> tuple[float, list[Record]]:
    """When the load began, and a record of every request, by script and turn. Raises RuntimeError where a client
    process ended early."""
    context = mp.get_context("spawn")
    clients = []
    for part in shared_out(mix, num_processes):
        ours, theirs = context.Pipe()
        process = context.Process(target=_client, args=(theirs, part, list(gateways)), daemon=True)
        process.start()
        theirs.close()
        clients.append((process, ours))
    try:
        for _, pipe in clients:
            pipe.recv()  # connected
        begin_s = time.monotonic() + HEAD_START_S
        for _, pipe in clients:
            pipe.send(begin_s)
        records: list[Record] = [record for _, pipe in clients for record in pipe.recv()]
    except EOFError:
        raise RuntimeError("a client process ended before its load did; its error is above") from None
    finally:
        for process, pipe in clients:
            pipe.close()
            process.join(10)
    return begin_s, sorted(records, key=lambda r: (r.script, r.turn))


def _client(pipe: Connection, part: Numbered, gateways: Sequence[str]) -> None:
    try:
        import uvloop  # half the time a message; the gateways run on it too
    except ImportError:
        asyncio.run(_play_part(pipe, part, gateways))
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_play_part(pipe, part, gateways))


async def _play_part(pipe: Connection, part: Numbered, gateways: Sequence[str]) -> None:
    options = [("grpc.use_local_subchannel_pool", 1)]  # else channels to one address share a connection
    channels = [
        grpc.aio.insecure_channel(gateways[i % len(gateways)], options=options)
        for i in range(max(len(gateways), -(-len(part) // STREAMS_A_CHANNEL)))
    ]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    calls = [c.unary_stream(METHOD, response_deserializer=pb.GenerateEvent.FromString) for c in channels]
    pipe.send("connected")
    begin_s: float = await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
    played = await asyncio.gather(
        *(_play_script(calls[i % len(calls)], number, script, begin_s) for i, (number, script) in enumerate(part))
    )
    for channel in channels:
        await channel.close()
    pipe.send([record for records in played for record in records])


async def _play_script(
    call: grpc.aio.UnaryStreamMultiCallable, number: int, script: Script, begin_s: float
) -> list[Record]:
    due_s = begin_s + script.start_s
    await asyncio.sleep(due_s - time.monotonic())
    records = []
    for turn, ask in enumerate(script.asks):
        record = Record(script=number, turn=turn, due_s=due_s, max_tokens=ask.max_tokens)
        await _ask(call, request_of(ask, script.session_id), record)
        records.append(record)
        if record.error:
            break
        due_s = record.end_s
    return records


async def _ask(call: grpc.aio.UnaryStreamMultiCallable, request: bytes, record: Record) -> None:
    record.sent_s = time.monotonic()
    arrivals = record.arrivals
    try:
        async for event in call(request, timeout=TIMEOUT_S):
            kind = event.WhichOneof("event")
            if kind in ("answer", "reasoning", "tool_call"):
                if count := len(getattr(event, kind).token_ids):
                    arrivals.append((time.monotonic(), count, kind == "reasoning"))
            elif kind == "finished":
                usage = event.finished.usage
                record.prompt_tokens, record.cached_tokens = usage.prompt_tokens, usage.cached_tokens
                record.completion_tokens = usage.completion_tokens
                record.server_ttft_s = event.finished.timings.time_to_first_token_s
    except grpc.aio.AioRpcError as error:
        record.error = f"{error.code().name}: {error.details()}"
    record.end_s = time.monotonic()
    if not record.error and not arrivals:
        record.error = "the stream ended without a token"


def request_of(ask: Ask, session_id: str = "") -> bytes:
    """As bytes: encoded before it is due."""
    request = pb.GenerateRequest(
        session_id=session_id,
        include_token_ids=True,
        sampling=pb.SamplingOptions(temperature=ask.temperature, max_tokens=ask.max_tokens, ignore_eos=ask.ignore_eos),
    )
    if ask.token_ids:
        request.token_ids.ids.extend(ask.token_ids)
    elif ask.prompt:
        request.prompt = ask.prompt
    else:
        request.chat.messages.add(role="user", content=ask.text)
        request.thinking.mode = pb.ThinkingOptions.ON if ask.thinking else pb.ThinkingOptions.OFF
    if ask.thinking_budget:
        request.thinking.budget_tokens = ask.thinking_budget
    return request.SerializeToString()
