"""Ten minutes of attacks on a gateway: every answer right, nothing crashed, nothing leaked, memory flat.

A gateway process with the demo model's real engine (`fuzz_server.py`) is attacked over real sockets by cases from seeds
(`fuzz_attacks.py`), many at once, in phases. Between phases everything must come to rest: no generation, request, KV
block or connection is left. Tasks, threads, descriptors and resident memory are compared over the phases: after the
first third they must not grow. Cases that once found something (`fuzz_seeds.txt`) come first. Beside it runs the
chunking property of the conversation (`fuzz_chunks.py`, at least 100,000 cuts). The last line is JSON; the exit code
is 1 if there was any finding.

    python -P -m expertmesh.bench.fuzz [--minutes 10] [--seed N] [--case ATTACK:SEED]"""

import argparse
import asyncio
import json
import multiprocessing as mp
import os
import random
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil

from ..redis_server import EmbeddedRedis
from . import fuzz_chunks
from .fuzz_attacks import ATTACKS, HANG_S, Finding, Target
from .fuzz_server import Books, TargetProcess

SEEDS_FILE = Path(__file__).with_name("fuzz_seeds.txt")
NUM_WORKERS = 16
PHASE_S = 30.0
REST_S = 90.0  # until everything has come to rest; resumable streams have a grace before
NUM_CUTS = 100_000
MAX_GROWTH = {"num_tasks": 2, "num_threads": 4, "num_fds": 16, "rss_bytes": 12 << 20}  # over the last two thirds
MAX_SHOWN = 20


@dataclass(slots=True)
class Report:
    num_cases: int = 0
    findings: list[str] = field(default_factory=list)
    phases: list[Books] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=dict)
    exit_code: int | None = None

    def found(self, text: str) -> None:
        self.findings.append(text)
        print(f"FINDING {text}", flush=True)


async def attack(seconds: float, seed: int, *, cases: list[tuple[str, int]] | None = None) -> Report:
    """`cases`: those alone, one after the other."""
    report = Report()
    with EmbeddedRedis(max_memory_bytes=64 << 20) as redis:
        process = await asyncio.to_thread(TargetProcess, redis.url)
        try:
            known = kept_cases() if cases is None else cases
            for name, case_seed in known:
                await _phase(report, process, [(name, case_seed)])
            deadline = time.monotonic() + seconds
            numbers = Random(seed)
            while cases is None and time.monotonic() < deadline and process.alive and len(report.findings) < 50:
                until = min(deadline, time.monotonic() + PHASE_S)
                await _phase(report, process, None, numbers, until)
                await _rest(report, process)
        finally:
            report.exit_code = await asyncio.to_thread(process.end)
    if report.exit_code:
        report.found(f"the gateway ended with exit code {report.exit_code}")
    _judge_growth(report)
    return report


async def _phase(
    report: Report,
    process: TargetProcess,
    cases: list[tuple[str, int]] | None,
    numbers: Random | None = None,
    until: float = 0.0,
) -> None:
    """Given cases in order, or drawn ones by many workers until a time."""
    target = Target(process.address)
    names, shares = list(ATTACKS), [share for share, _ in ATTACKS.values()]

    async def work() -> None:
        assert numbers is not None
        while time.monotonic() < until and process.alive:
            await _case(report, target, numbers.choices(names, shares)[0], numbers.getrandbits(48))

    try:
        for name, seed in cases or ():
            await _case(report, target, name, seed)
        if cases is None:
            await asyncio.gather(*(work() for _ in range(NUM_WORKERS)))
    finally:
        await target.close()
        for name, count in target.answers.items():
            report.answers[name] = report.answers.get(name, 0) + count


async def _case(report: Report, target: Target, name: str, seed: int) -> None:
    report.num_cases += 1
    try:
        async with asyncio.timeout(2 * HANG_S):
            await ATTACKS[name][1](Random(seed), target)
    except Finding as finding:
        report.found(f"{name}:{seed} {finding}")
    except TimeoutError:
        report.found(f"{name}:{seed} hangs")
    except asyncio.CancelledError:  # grpc.aio: the call's channel was closed by another case
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise
    except Exception:  # the attacker's own bug is a finding too: it must not hide one
        report.found(f"{name}:{seed} {traceback.format_exc(limit=-3)}")


async def _rest(report: Report, process: TargetProcess) -> None:
    """Wait until nothing is left; what stays is a leak."""
    deadline = time.monotonic() + REST_S
    num_errors = len(report.phases[-1].errors) if report.phases else 0
    while True:
        try:
            books = await asyncio.to_thread(process.books)
        except (EOFError, OSError, TimeoutError) as error:
            report.found(f"the gateway does not answer: {type(error).__name__} {error}")
            return
        left = leaks(books)
        if not left or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.5)
    if left:
        report.found(f"left after {REST_S:g} s of rest: {left}")
    for line in books.errors[num_errors:]:
        report.found(f"logged by the gateway: {line}")
    report.phases.append(books)
    print(
        f"phase {len(report.phases)}: {report.num_cases} cases, {books.rss_bytes >> 20} MiB, {books.num_tasks} tasks, "
        f"{books.heap_bytes >> 20} MiB and {books.num_python_blocks} Python blocks in use, "
        f"{books.num_threads} threads, {books.num_fds} descriptors, {len(report.findings)} findings",
        flush=True,
    )


def leaks(books: Books) -> dict[str, int]:
    """What must be zero at rest and is not."""
    counts = {k: v for k, v in asdict(books).items() if isinstance(v, int)}
    names = ("num_running", "num_waiting", "num_in_flight", "num_routes", "num_engine", "num_used_kv_blocks")
    left = {name: counts[name] for name in names if counts[name]}
    # a socket that this process still holds is no leak of the gateway's
    held = {c.laddr.port for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED}
    if num_connections := sum(port not in held for port in books.peer_ports):
        left["num_connections"] = num_connections
    return left


def _judge_growth(report: Report) -> None:
    """From the end of the first third on, when caches are warm, nothing grows. Too short a run says nothing."""
    if len(report.phases) < 6:
        return
    settled = report.phases[len(report.phases) // 3 :]
    half = len(settled) // 2
    for name, most in MAX_GROWTH.items():
        values = [getattr(books, name) for books in settled]
        growth = max(values[half:]) - max(values[:half])
        if growth > most:
            report.found(f"{name} grows: {values}")


def kept_cases() -> list[tuple[str, int]]:
    """`fuzz_seeds.txt`: a line `ATTACK:SEED  # what it found` each."""
    lines = [line.partition("#")[0].strip() for line in SEEDS_FILE.read_text().splitlines()]
    return [(name, int(seed)) for name, seed in (line.split(":") for line in lines if line)]


def _run_chunks(seed: int, result: Any) -> None:
    """In a process of its own: the conversation is all Python."""
    os.nice(5)
    result.put(fuzz_chunks.run(seed, NUM_CUTS)["cuts"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--case", action="append", help="ATTACK:SEED as a finding names it; only such cases run")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    cases = None
    if arguments.case:
        cases = [(name, int(seed)) for name, seed in (case.split(":") for case in arguments.case)]
    context = mp.get_context("spawn")
    result = context.Queue()
    chunks = context.Process(target=_run_chunks, args=(arguments.seed, result), daemon=True)
    if cases is None:
        chunks.start()
    report = asyncio.run(attack(60 * arguments.minutes, arguments.seed, cases=cases))
    num_cuts = 0
    if cases is None:
        chunks.join()
        num_cuts = result.get() if chunks.exitcode == 0 else 0
        if not num_cuts:
            report.found(f"the chunking property: exit code {chunks.exitcode}, {num_cuts} cuts")
    settled = report.phases[len(report.phases) // 3 :]
    figures = {
        "bench": "fuzz",
        "seed": arguments.seed,
        "minutes": arguments.minutes,
        "cases": report.num_cases,
        "answers": dict(sorted(report.answers.items())),
        "chunk_cuts": num_cuts,
        "rest_points": len(report.phases),
        "rss_mib_after_warm_up": round(settled[0].rss_bytes / 2**20, 1) if settled else None,
        "rss_mib_at_the_end": round(settled[-1].rss_bytes / 2**20, 1) if settled else None,
        "exit_code": report.exit_code,
        "findings": len(report.findings),
        "met": not report.findings,
    }
    for text in report.findings[:MAX_SHOWN]:
        print(text)
    print(json.dumps(figures))
    return 0 if figures["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
