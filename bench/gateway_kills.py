"""Gateways are killed under running streams: every client resumes by itself and sees the events of an undisturbed run.

`make gateway-kills`. A run is one SIGKILL of a gateway process while two resumable streams of one client are under way
in it, a plain request and a turn of a session, at a place that chance picks. Each stream must come to its end through
another gateway: offsets without a gap, tokens, texts and usage those of the undisturbed stream, the very events that a
later Resume from 0 gives, and the turn in the session's record once. The killed gateway is started again on its port.

The demo model is real, its steps are slowed to `--step-ms` so that a stream lasts; one engine, three gateways, an
embedded Redis, all processes of this machine. The last line is JSON; exit 1 where a run is not identical."""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass, field

from ..client import AsyncClient, AsyncStream, Event
from ..redis_server import EmbeddedRedis
from .gateway_processes import EngineProcess, GatewayPlan, GatewayProcess
from .streams import OPTIONS, REQUESTS, folded, token_ids

NUM_GATEWAYS = 3
STREAM_S = 60.0
MAX_TRIES = 20  # runs in a row whose streams had ended before the kill


@dataclass(slots=True)
class Figures:
    runs: int = 0
    streams: int = 0
    too_late: int = 0  # tries whose streams had ended before the signal: not counted as runs
    wrong: list[str] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)  # longest wait for an event, of each broken stream


class World:
    """Gateways before an engine."""

    def __init__(self, link_address: str, redis_url: str) -> None:
        plan = GatewayPlan(link_address, redis_url)
        self.gateways = [GatewayProcess(plan) for _ in range(NUM_GATEWAYS)]
        self.addresses = [gateway.wait_ready() for gateway in self.gateways]
        self._plans = [
            GatewayPlan(link_address, redis_url, port=int(address.rpartition(":")[2])) for address in self.addresses
        ]

    def start_again(self, index: int) -> None:
        self.gateways[index] = GatewayProcess(self._plans[index])

    def stop(self) -> None:
        for gateway in self.gateways:
            gateway.kill()


async def undisturbed(world: World) -> list[tuple[list[tuple[object, ...]], list[int]]]:
    """Of every request: what its stream says, and its token ids."""
    found = []
    async with AsyncClient(world.addresses) as client:
        for text, options in REQUESTS:
            events = [e async for e in client.generate(text, timeout_s=STREAM_S, **OPTIONS, **options)]
            found.append((folded(events), token_ids(events)))
    return found


async def kill_once(
    world: World, number: int, victim: int, expected: list[tuple[list[tuple[object, ...]], list[int]]],
    chance: random.Random, figures: Figures,
) -> bool:  # fmt: skip
    """Whether it was a run: the signal came while a stream was under way."""
    others = [a for i, a in enumerate(world.addresses) if i != victim]
    chance.shuffle(others)
    session_id = f"s-{number}"
    which = [chance.randrange(len(REQUESTS)) for _ in range(2)]
    async with AsyncClient([world.addresses[victim], *others]) as client:
        streams = []
        for index, session in zip(which, ("", session_id), strict=True):
            text, options = REQUESTS[index]
            streams.append(client.generate(text, session_id=session, timeout_s=STREAM_S, **OPTIONS, **options))
        cut = chance.randrange(1, 24)
        ready = asyncio.Event()
        readers = [asyncio.create_task(_read(stream, cut, ready)) for stream in streams]
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({waiting, *readers}, timeout=STREAM_S, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        world.gateways[victim].kill()
        world.start_again(victim)
        results = await asyncio.gather(*readers)
        broken = [stream.num_resumed > 0 for stream in streams]
        if not any(broken):
            figures.too_late += 1
        for index, stream, (events, pause_s), was_broken in zip(which, streams, results, broken, strict=True):
            figures.streams += was_broken
            if was_broken:
                figures.pauses_s.append(pause_s)
            try:
                assert folded(events) == expected[index][0], "the stream differs from the undisturbed one"
                again = [e async for e in client.resume(stream.request_id, timeout_s=STREAM_S)]
                assert again == events, "resumed from 0 it is another sequence of events"
            except Exception as error:
                figures.wrong.append(f"run {number}: {type(error).__name__}: {error}")
        turns = (await client.export_session(session_id)).turn_ids
        if [list(turn.output_ids) for turn in turns] != [expected[which[1]][1]]:
            figures.wrong.append(f"run {number}: the session has {len(turns)} turns, or another text")
        await client.delete_session(session_id)
    await asyncio.to_thread(world.gateways[victim].wait_ready)
    return any(broken)


async def _read(stream: AsyncStream, cut: int, ready: asyncio.Event) -> tuple[list[Event], float]:
    """All events and the longest wait between two; `ready` is set at the one that chance picked."""
    events: list[Event] = []
    longest, last = 0.0, time.perf_counter()
    async for event in stream:
        now = time.perf_counter()
        if events:
            longest = max(longest, now - last)
        last = now
        events.append(event)
        if len(events) == cut:
            ready.set()
    return events, longest


async def run(link_address: str, num_runs: int, seed: int, progress: bool = True) -> Figures:
    chance, figures = random.Random(seed), Figures()
    with EmbeddedRedis() as redis:
        world = World(link_address, redis.url)
        try:
            expected = await undisturbed(world)
            number = tries = 0
            while figures.runs < num_runs and tries < MAX_TRIES:
                number, tries = number + 1, tries + 1
                if await kill_once(world, number, number % NUM_GATEWAYS, expected, chance, figures):
                    figures.runs, tries = figures.runs + 1, 0
                    if progress and figures.runs % 10 == 0:
                        print(f"{figures.runs} kills, {len(figures.wrong)} wrong", flush=True)
        finally:
            world.stop()
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--step-ms", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    engine = EngineProcess(arguments.step_ms / 1e3)
    try:
        figures = asyncio.run(run(engine.wait_ready(), arguments.runs, arguments.seed))
    finally:
        engine.kill()
    for line in figures.wrong:
        print(line)
    pauses = sorted(figures.pauses_s)
    print(
        json.dumps(
            {
                "bench": "gateway_kills",
                "device": f"cpu, {os.cpu_count()} cores",
                "runs": figures.runs,
                "identical_runs": figures.runs - len({line.partition(":")[0] for line in figures.wrong}),
                "broken_streams": figures.streams,
                "kills_after_the_end_not_counted": figures.too_late,
                "longest_wait_p50_s": round(statistics.median(pauses), 3) if pauses else None,
                "longest_wait_max_s": round(pauses[-1], 3) if pauses else None,
                "seed": arguments.seed,
                "total_s": round(time.perf_counter() - started, 1),
            }
        )
    )
    return 0 if figures.runs == arguments.runs and not figures.wrong else 1


if __name__ == "__main__":
    sys.exit(main())
