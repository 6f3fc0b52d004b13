"""What the gateway costs: 256 streams through it, against a bare grpc.aio server that streams messages of that size.

Each in a process of its own, one client, same machine and run, taken in turns. Behind the gateway is a fake engine in a
third process, over the real link. A token passes link, detokenizer, conversation and event on its way; the bare server
writes the same bytes in a loop. A gateway that falls behind puts several tokens into a message, so the engine is paced,
at several fractions of the bare rate, and what counts is messages per second: the best pace is the verdict, and the
unpaced run (tokens as fast as they come) is shown beside it. Goal: >= 0.6 of the bare server. The last line is JSON.

    python -P -m expertmesh.bench.gateway [--streams 256] [--tokens 200] [--rounds 3]"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing as mp
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from ..proto import expertmesh_pb2 as pb
from ..router.gateway.conversation import Conversation
from ..router.gateway.generation import GenerationConfig
from ..router.gateway.link import LinkServer
from ..router.gateway.server import GatewayServer
from ..router.gateway.tier import AttentionTier
from ..router.gateway.tokenizer import QWEN3_FOLDER, Tokenizer
from .fake_engine import FakeEngine

try:
    import uvloop  # what Ray gives its workers where it is installed, so a deployed gateway runs on it
except ImportError:
    uvloop = None

GOAL = 0.6
TOKEN = "bench"
METHOD = "/expertmesh.v1.Generation/Generate"
TEXT = "The expert tier multiplies, the attention tier remembers, and the gateway only carries what they say. "


PACES = (0.6, 0.8, 1.0)  # tokens/s asked of the engine, in units of the bare server's messages/s


@dataclass(frozen=True, slots=True)
class Rates:
    """One run of all streams."""

    messages_per_s: float
    tokens_per_s: float
    first_message_p50_s: float
    server_cpu_us: float  # CPU time of the server process per message


# ---------------------------------------------------------------- the three servers, a process each


class Server:
    """One server process. `pipe` hands it numbers; None ends it."""

    def __init__(self, target: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(target, theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.address: str = self.pipe.recv()

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self.pipe.send(None)
        self._process.join(10)


def _main(target: Callable[..., Awaitable[None]], pipe: Connection, *arguments: Any) -> None:
    if uvloop is not None:
        uvloop.install()
    asyncio.run(target(pipe, *arguments))


async def until_ended(pipe: Connection, on_number: Callable[[float], None] = lambda _: None) -> None:
    """Returns when the parent sends None or goes away; numbers that it sends are handed on."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def read() -> None:
        with contextlib.suppress(EOFError):
            if (value := pipe.recv()) is not None:
                on_number(value)
                return
        loop.remove_reader(pipe.fileno())
        ended.set()

    loop.add_reader(pipe.fileno(), read)
    await ended.wait()


async def engine_process(pipe: Connection, num_tokens: int) -> None:
    ids = Tokenizer(QWEN3_FOLDER).encode(TEXT)
    reply = (ids * (num_tokens // len(ids) + 1))[:num_tokens]
    link = LinkServer(replica_id="fake", max_model_len=1 << 20, cluster_token=TOKEN)
    engine = FakeEngine(link.publish, lambda _request: reply)

    def set_step(step_s: float) -> None:
        engine.step_s = step_s

    pipe.send(await link.start(engine))
    await until_ended(pipe, set_step)
    engine.stop()
    await link.stop()


async def gateway_process(pipe: Connection, link_address: str) -> None:
    tier = AttentionTier(gateway_id="bench", cluster_token=TOKEN)
    tier.set_replicas({"fake": link_address})
    await tier.wait_connected(20)
    config = GenerationConfig(model="fake", max_model_len=1 << 20, vocab_size=151_936)
    server = GatewayServer(config, tokenizer=Tokenizer(QWEN3_FOLDER), tier=tier)
    pipe.send(await server.start())
    await until_ended(pipe)
    await server.stop()
    await tier.close()


async def bare_process(pipe: Connection, num_tokens: int, message: bytes) -> None:
    async def stream(_data: bytes, context: grpc.aio.ServicerContext) -> None:
        for _ in range(num_tokens):
            await context.write(message)

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    service, method = METHOD.lstrip("/").split("/")
    handlers = {method: grpc.unary_stream_rpc_method_handler(stream)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send(f"127.0.0.1:{port}")
    await until_ended(pipe)
    await server.stop(0)


# ---------------------------------------------------------------- the client


async def measure(server: "Server", num_streams: int, request: bytes, num_tokens: int) -> Rates:
    """All streams at once, read to their ends as bytes, so that the client costs both sides the same."""
    num_messages = 0
    first: list[float] = []
    cpu_s = server.cpu_s()
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = channel.unary_stream(METHOD)

        async def read() -> None:
            nonlocal num_messages
            started = time.perf_counter()
            count = 0
            async for _ in call(request):
                count += 1
                if count == 1:
                    first.append(time.perf_counter() - started)
            num_messages += count

        started = time.perf_counter()
        await asyncio.gather(*(read() for _ in range(num_streams)))
        wall_s = time.perf_counter() - started
    return Rates(
        messages_per_s=num_messages / wall_s,
        tokens_per_s=num_streams * num_tokens / wall_s,
        first_message_p50_s=statistics.median(first),
        server_cpu_us=(server.cpu_s() - cpu_s) / num_messages * 1e6,
    )


@contextlib.contextmanager
def servers(num_tokens: int) -> Iterator[tuple[Server, Server, Server]]:
    """Engine, gateway, bare server."""
    size = len(pb.GenerateEvent(offset=100, answer=pb.Delta(text=" tiers")).SerializeToString())
    started: list[Server] = []
    try:
        engine = Server(engine_process, num_tokens)
        started.append(engine)
        bare = Server(bare_process, num_tokens, b"x" * size)
        started.append(bare)
        gateway = Server(gateway_process, engine.address)
        started.append(gateway)
        yield engine, gateway, bare
    finally:
        for server in reversed(started):
            server.end()


async def run(num_streams: int, num_tokens: int, rounds: int) -> dict[str, Any]:
    options = pb.SamplingOptions(max_tokens=num_tokens, temperature=0)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 2, 3]), sampling=options).SerializeToString()
    runs: list[dict[float, Rates]] = []  # a round each: pace -> gateway, -1 -> bare, 0 -> gateway unpaced
    with servers(num_tokens) as (engine, gateway, bare):
        for index in range(rounds + 1):
            found = {-1.0: await measure(bare, num_streams, request, num_tokens)}
            for pace in (0.0, *PACES) if index else (0.0,):
                engine.pipe.send(num_streams / (pace * found[-1.0].messages_per_s) if pace else 0.0)
                found[pace] = await measure(gateway, num_streams, request, num_tokens)
            if index:  # the first round warms up
                runs.append(found)
                _show(found)
    return _figures(runs, num_streams, num_tokens)


def _show(found: dict[float, Rates]) -> None:
    for pace, r in sorted(found.items()):
        name = "bare server" if pace < 0 else f"gateway, pace {pace:g}" if pace else "gateway, unpaced"
        print(
            f"{name:18}{r.messages_per_s:9.0f} messages/s {r.tokens_per_s:9.0f} tokens/s {r.server_cpu_us:6.0f} us CPU "
            f"a message, first after {r.first_message_p50_s * 1e3:.0f} ms",
            flush=True,
        )


def _figures(runs: list[dict[float, Rates]], num_streams: int, num_tokens: int) -> dict[str, Any]:
    """Medians over the rounds; the pace with the most messages is the verdict."""
    ratios = {p: statistics.median(r[p].messages_per_s / r[-1.0].messages_per_s for r in runs) for p in PACES}
    best = max(ratios, key=lambda pace: ratios[pace])

    def median(pace: float, name: str) -> float:
        return round(statistics.median(getattr(r[pace], name) for r in runs), 1)

    return {
        "bench": "gateway",
        "streams": num_streams,
        "tokens_per_stream": num_tokens,
        "rounds": len(runs),
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "event_loop": "asyncio" if uvloop is None else "uvloop",
        "bare_messages_per_s": median(-1.0, "messages_per_s"),
        "gateway_messages_per_s": median(best, "messages_per_s"),
        "tokens_per_message": round(median(best, "tokens_per_s") / median(best, "messages_per_s"), 2),
        "gateway_tokens_per_s_unpaced": median(0.0, "tokens_per_s"),
        "bare_cpu_us_per_message": median(-1.0, "server_cpu_us"),
        "gateway_cpu_us_per_message": median(best, "server_cpu_us"),
        "conversation_us_per_token_p50": round(conversation_us(), 2),
        "ratio_by_pace": {str(p): round(r, 3) for p, r in ratios.items()},
        "ratio": round(ratios[best], 3),
        "goal": GOAL,
        "met": ratios[best] >= GOAL,
    }


def conversation_us(rounds: int = 2000) -> float:
    """Median time a token takes from id to serialised event: detokenizer, state machine with one stop string, delta."""
    tokenizer = Tokenizer(QWEN3_FOLDER)
    ids = tokenizer.encode(TEXT)
    machine = Conversation(tokenizer, stop=("\n\nUser:",))
    times = []
    for offset in range(rounds):
        token_ids = [ids[offset % len(ids)]]
        started = time.perf_counter()
        for delta in machine.push(token_ids):
            pb.GenerateEvent(offset=offset, answer=pb.Delta(text=delta.text)).SerializeToString()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    figures = asyncio.run(run(arguments.streams, arguments.tokens, arguments.rounds))
    print(json.dumps(figures))
    return 0 if figures["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
