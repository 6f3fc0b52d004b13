"""Redis is stopped and killed under running conversations: no committed turn is lost or doubled.

`make redis-faults`. A run is one fault of one Redis server with a gateway of its own: half are SIGSTOP for 10 s, half
SIGKILL and a start on its append-only file after 2 s. Several pairs run side by side before one engine (the demo model,
real). Around each fault:

- sessions take turns, one after the other, under request ids that are kept until the turn is in: what the clients were
  told is compared with the records afterwards, turn by turn, ids and order (so a lost turn, a doubled one and two that
  changed places all show);
- one turn is in work when the fault comes, and must be in the record when Redis is back;
- a new turn during the fault must be refused as UNAVAILABLE with a retry delay;
- plain requests go on and must all be answered.

Redis runs with `appendonly yes, appendfsync always`: what it has answered is on its disk. The last line is JSON; exit 1
where anything of this fell short."""

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..client import AsyncClient, Finished
from ..errors import ExpertMeshError, SessionStoreUnavailable, Unavailable
from .gateway_processes import EngineProcess, GatewayPlan, GatewayProcess
from .valkey import ValkeyProcess

STOP_S, DOWN_S = 10.0, 2.0
SETTLE_S = 120.0
NUM_SESSIONS = 3  # of each pair, beside the one whose turn is in work at the fault
TURN: dict[str, Any] = {"max_tokens": 16, "thinking": "off", "timeout_s": 60.0}
LONG_TURN: dict[str, Any] = {**TURN, "max_tokens": 64, "thinking": "on"}


@dataclass(slots=True)
class Figures:
    runs: dict[str, int] = field(default_factory=lambda: {"stopped": 0, "killed": 0})
    turns: int = 0  # that clients were told of
    committed_later: int = 0  # told committed=false, and in the record afterwards
    refused: int = 0  # with a retry delay
    plain: int = 0  # requests without a session, answered
    plain_longest_s: float = 0.0
    wrong: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Ledger:
    """What the client of one session was told: request ids of finished turns, in order."""

    session_id: str
    finished: list[str] = field(default_factory=list)


class Pair:
    """One Redis, one gateway, and their clients."""

    def __init__(self, number: int, folder: Path, link_address: str, figures: Figures) -> None:
        self.number, self.figures = number, figures
        self.redis = ValkeyProcess(folder, "--appendonly", "yes", "--appendfsync", "always")
        self.gateway = GatewayProcess(GatewayPlan(link_address, self.redis.url))
        self.ledgers: list[Ledger] = []
        self._stop = asyncio.Event()  # no further turns

    async def runs(self, kinds: Sequence[str]) -> None:
        await asyncio.to_thread(self.gateway.wait_ready)
        async with AsyncClient(self.gateway.address) as client:
            plain = asyncio.create_task(self._plain(client))
            for index, kind in enumerate(kinds):
                try:
                    async with asyncio.timeout(STOP_S + 2 * SETTLE_S):
                        await self._run(client, index, kind)
                    self.figures.runs[kind] += 1
                except Exception as error:
                    self._wrong(f"run {index} ({kind})", error)
                    break
            plain.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await plain

    def stop(self) -> None:
        self.gateway.kill()
        with contextlib.suppress(ProcessLookupError, AssertionError):
            self.redis.go_on()
        self.redis.kill()

    async def _run(self, client: AsyncClient, index: int, kind: str) -> None:
        self._stop.clear()
        self.ledgers = [Ledger(f"p{self.number}-r{index}-s{i}") for i in range(NUM_SESSIONS)]
        writers = [asyncio.create_task(self._write(client, ledger)) for ledger in self.ledgers]
        await self._all_have(writers, 1)
        in_flight = Ledger(f"p{self.number}-r{index}-f")
        stream = client.generate("What is 17 + 25?", session_id=in_flight.session_id, seed=index, **LONG_TURN)
        await anext(stream)
        if kind == "stopped":
            self.redis.pause()
        else:
            self.redis.kill()
        away_until = time.monotonic() + (STOP_S if kind == "stopped" else DOWN_S)
        refusal = asyncio.create_task(self._must_be_refused(client, f"p{self.number}-n{index}"))
        async for _ in stream:
            pass
        assert stream.finished is not None
        in_flight.finished.append(stream.request_id)
        was_later = not stream.finished.committed
        await asyncio.sleep(max(0.0, away_until - time.monotonic()))
        if kind == "stopped":
            self.redis.go_on()
        else:
            await asyncio.to_thread(self.redis.start)
        await refusal
        await self._all_have(writers, 2)  # the one that the fault hit, and one begun after it
        self._stop.set()
        await asyncio.gather(*writers)
        for ledger in (in_flight, *self.ledgers):
            await self._check(client, ledger)
            await client.delete_session(ledger.session_id)
        self.figures.turns += 1
        self.figures.committed_later += was_later

    async def _write(self, client: AsyncClient, ledger: Ledger) -> None:
        """Turn after turn, each asked for until it is answered."""
        while not self._stop.is_set():
            request_id = f"{ledger.session_id}-t{len(ledger.finished)}"
            finished = await self._turn(client, ledger.session_id, request_id)
            if finished is not None:
                ledger.finished.append(request_id)
                self.figures.turns += 1
                self.figures.committed_later += not finished.committed

    async def _turn(self, client: AsyncClient, session_id: str, request_id: str) -> Finished | None:
        """None: refused. Every other turn is resumable, so its journal is under the fault too."""
        resumable = request_id[-1] in "02468"
        try:
            options = {**TURN, "request_id": request_id, "session_id": session_id, "resumable": resumable}
            stream = client.generate(f"What is 3 + {len(request_id)}?", **options)
            await stream.answer()
            return stream.finished
        except Unavailable as error:
            self.figures.refused += 1
            if error.retry_after_s is None:
                self._wrong("a refusal without a retry delay", error)
            await asyncio.sleep(min(error.retry_after_s or 1.0, 2.0))
            return None

    async def _must_be_refused(self, client: AsyncClient, session_id: str) -> None:
        """A new turn while Redis is away."""
        try:
            await client.generate("Hello", session_id=session_id, **TURN).answer()
        except SessionStoreUnavailable as error:
            if error.retry_after_s is None:
                self._wrong("a refusal without a retry delay", error)
            self.figures.refused += 1
        except ExpertMeshError as error:
            self._wrong("a new turn while Redis is away", error)
        else:
            self._wrong("a new turn while Redis is away", AssertionError("was not refused"))

    async def _all_have(self, writers: Sequence[asyncio.Task[None]], num_more: int) -> None:
        """Until every session has so many more turns."""
        wanted = [len(ledger.finished) + num_more for ledger in self.ledgers]
        async with asyncio.timeout(SETTLE_S):
            while any(len(k.finished) < n for k, n in zip(self.ledgers, wanted, strict=True)):
                for writer in writers:
                    if writer.done():
                        await writer
                await asyncio.sleep(0.05)

    async def _check(self, client: AsyncClient, ledger: Ledger) -> None:
        """The record has the turns that the client was told of, once and in order; one may still be on its way."""
        found: list[str] = []
        async with asyncio.timeout(SETTLE_S):
            while True:
                with contextlib.suppress(ExpertMeshError):
                    found = [turn.request_id for turn in (await client.get_session(ledger.session_id)).turns]
                if len(found) >= len(ledger.finished):
                    break
                await asyncio.sleep(0.05)
        if found != ledger.finished:
            error = AssertionError(f"the record has {found[-6:]}, the client was told of {ledger.finished[-6:]}")
            self._wrong(f"session {ledger.session_id}", error)

    async def _plain(self, client: AsyncClient) -> None:
        """Requests without a session, as if nothing were the matter."""
        while True:
            started = time.monotonic()
            try:
                await client.generate("What is 6 * 7?", **TURN).answer()
                self.figures.plain += 1
                self.figures.plain_longest_s = max(self.figures.plain_longest_s, time.monotonic() - started)
            except ExpertMeshError as error:
                self._wrong("a plain request", error)
            await asyncio.sleep(0.2)

    def _wrong(self, what: str, error: BaseException) -> None:
        self.figures.wrong.append(f"pair {self.number}, {what}: {type(error).__name__}: {error}")


async def run(num_runs: int, num_pairs: int, step_s: float) -> Figures:
    figures = Figures()
    kinds: list[list[str]] = [[] for _ in range(num_pairs)]
    for i in range(num_runs):
        kinds[i % num_pairs].append("killed" if (i // num_pairs + i) % 2 else "stopped")
    engine = EngineProcess(step_s)
    pairs: list[Pair] = []
    try:
        address = engine.wait_ready()
        with tempfile.TemporaryDirectory(prefix="expertmesh-redis-faults-") as folder:
            pairs += [Pair(i, Path(folder) / str(i), address, figures) for i in range(num_pairs)]
            try:
                await asyncio.gather(*(pair.runs(k) for pair, k in zip(pairs, kinds, strict=True)))
            finally:
                for pair in pairs:
                    pair.stop()
    finally:
        engine.kill()
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=10, help="Redis servers with a gateway each, side by side")
    parser.add_argument("--step-ms", type=float, default=8.0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    figures = asyncio.run(run(arguments.runs, arguments.pairs, arguments.step_ms / 1e3))
    for line in figures.wrong:
        print(line)
    print(
        json.dumps(
            {
                "bench": "redis_faults",
                "device": f"cpu, {os.cpu_count()} cores",
                "run": f"one SIGSTOP of {STOP_S:g} s, or one SIGKILL and a start after {DOWN_S:g} s, of one Redis",
                "runs_stopped": figures.runs["stopped"],
                "runs_killed": figures.runs["killed"],
                "pairs": arguments.pairs,
                "turns": figures.turns,
                "turns_committed_later": figures.committed_later,
                "turns_refused_with_a_delay": figures.refused,
                "plain_requests": figures.plain,
                "plain_longest_s": round(figures.plain_longest_s, 2),
                "wrong": len(figures.wrong),
                "total_s": round(time.perf_counter() - started, 1),
            }
        )
    )
    return 0 if sum(figures.runs.values()) == arguments.runs and not figures.wrong else 1


if __name__ == "__main__":
    sys.exit(main())
