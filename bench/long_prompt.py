"""A long prompt beside short streams: what it does to their inter-token time, and how long it takes itself.

After a replica's own warm-up short streams decode undisturbed; then prompts of 32K and 128K tokens (YaRN) come, one
after the other, while they go on. Chunks of a long prompt share steps with the decodes, so their size sets everybody's
time; the scheduler makes them smaller as the context grows, by what it has learned of steps (`pace.py`, shown). Goal:
p99 at most 3 x undisturbed. When the streams have gone the first prompt comes once more, alone. The longest steps
beside each prompt are shown with what was in them (`step_watch.py`). The last line is JSON.

    python -m expertmesh.bench.long_prompt --prompts 32768,131000 --streams 32"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import CacheConfig, SchedulerConfig
from ..request import EngineRequest, SamplingParams
from .local_engine import LocalEngine, Stream
from .step_cases import CASES, open_case
from .step_watch import StepWatch

GOAL = 3.0  # x undisturbed p99
UNDISTURBED_S = 3.0
NUM_SHOWN = 10  # of the longest steps


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=tuple(CASES), default="30b-128k")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompts", type=lambda text: [int(n) for n in text.split(",")], default=[32768, 131000])
    parser.add_argument("--chunk", type=int, default=1024, help="scheduler.max_prefill_tokens_per_step")
    parser.add_argument("--stretch", type=float, default=2.5, help="scheduler.max_step_stretch")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_case(arguments.case, Path(folder))
        longest = max(arguments.prompts) + 64
        scheduler = SchedulerConfig(
            max_num_seqs=arguments.max_num_seqs,
            max_num_batched_tokens=max(2048, arguments.chunk + arguments.max_num_seqs),
            max_prefill_tokens_per_step=arguments.chunk,
            max_step_stretch=arguments.stretch,
        )
        on_gpu = arguments.device != "cpu"
        kv_bytes = 0 if on_gpu else 2 * longest * checkpoint.config.kv_bytes_per_token(4)
        watch = StepWatch()
        engine = LocalEngine(
            checkpoint,
            cache=CacheConfig(enable_prefix_cache=False, kv_memory_bytes=max(kv_bytes, 64 << 20)),
            scheduler=scheduler,
            batch_invariant=not on_gpu,
            device=arguments.device,
            max_model_len=longest + 1,
            observer=watch,
        )
        watch.watch(engine.runner)
        with engine:
            vocab_size = min(checkpoint.config.vocab_size, engine.engine.vocab_size)
            print(warmed(engine), flush=True)
            result = measure(engine, watch, arguments.streams, arguments.prompts, vocab_size)
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    told = {"device": name, "streams": arguments.streams, "chunk": arguments.chunk, "stretch": arguments.stretch}
    print(json.dumps(told | result))
    return 0 if all(p["complete"] for p in result["prompts"]) else 1


def warmed(engine: LocalEngine) -> str:
    """What the warm-up took."""
    runner: Any = engine.runner
    on_gpu = torch.device(runner.device).type == "cuda"
    free = torch.cuda.mem_get_info(runner.device)[0] if on_gpu else 0
    before, idle = engine.warm_up()
    said = f"warm after {before:.1f} s, and {idle:.1f} s of idle time"
    if on_gpu:
        taken = (free - torch.cuda.mem_get_info(runner.device)[0]) / 2**20
        said += f"; {runner.num_captures} graphs of decodes, {taken:.0f} MiB of the GPU taken meanwhile"
    return f"{said}\n{engine.engine.scheduler.pace}"


def measure(
    engine: LocalEngine, watch: StepWatch, num_streams: int, prompts: Sequence[int], vocab_size: int
) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def request(name: str, length: int, max_tokens: int) -> EngineRequest:
        ids = tuple(rng.integers(0, vocab_size, length).tolist())
        return EngineRequest(request_id=name, prompt_ids=ids, sampling=SamplingParams(max_tokens=max_tokens))

    company = _Company(engine, lambda i: request(f"short{i}", 100, 400), num_streams)
    company.start()
    time.sleep(1.0)  # graphs are captured
    began = time.perf_counter()
    time.sleep(UNDISTURBED_S)
    undisturbed = company.gaps(began, time.perf_counter())
    found: list[dict[str, Any]] = []
    for length in prompts:
        long = request(f"long{length}", length, 2)
        began = time.perf_counter()
        stream = engine.submit(long)
        engine.wait([f"long{length}"])
        ended = time.perf_counter()
        gaps = company.gaps(began, ended)
        p99 = 1e3 * float(np.quantile(gaps, 0.99))
        found.append(
            {
                "tokens": length,
                "seconds": ended - began,
                "itl_p50_ms": 1e3 * statistics.median(gaps),
                "itl_p99_ms": p99,
                "itl_max_ms": 1e3 * max(gaps),
                "times_undisturbed": p99 / (1e3 * float(np.quantile(undisturbed, 0.99))),
                "complete": len(stream.token_ids) == 2,
            }
        )
        print(found[-1], flush=True)
        longest = watch.longest(NUM_SHOWN, began, ended)
        for step in longest:
            print(f"  at {step.at_s - began:6.3f} s, {step}", flush=True)
        found[-1]["longest_steps"] = [str(step) for step in longest]
        print(engine.engine.scheduler.pace, flush=True)
    company.stop()
    (alone,) = engine.run([request("alone", prompts[0], 2)])
    print(f"{prompts[0]} tokens alone: first token after {alone.time_to_first_token_s:.3f} s", flush=True)
    watch.close()
    return {
        "undisturbed_p50_ms": 1e3 * statistics.median(undisturbed),
        "undisturbed_p99_ms": 1e3 * float(np.quantile(undisturbed, 0.99)),
        "prompts": found,
        "alone_s": alone.time_to_first_token_s,
        "goal_times_undisturbed": GOAL,
        "goal_met": all(p["times_undisturbed"] <= GOAL for p in found),
    }


class _Company:
    """Short streams, each replaced by another when it ends."""

    def __init__(self, engine: LocalEngine, make: Callable[[int], EngineRequest], count: int) -> None:
        self._engine, self._make, self._count = engine, make, count
        self._streams: list[Stream] = []
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended = True
        self._thread.join()

    def gaps(self, began: float, ended: float) -> list[float]:
        """Seconds between two tokens of one stream, of tokens that came in this time."""
        times = [[t for t in list(s.token_times_s) if began <= t <= ended] for s in list(self._streams)]
        return [gap for one in times for gap in np.diff(one).tolist()]

    def _run(self) -> None:
        """One thread for all: many would want the interpreter whenever the engine does."""
        running = {self._submit(i) for i in range(self._count)}
        turn = self._count
        while running:
            for name in self._engine.wait_for_any(running):
                running.remove(name)
                if not self._ended:
                    running.add(self._submit(turn))
                    turn += 1

    def _submit(self, turn: int) -> str:
        request = self._make(turn)
        self._streams.append(self._engine.submit(request))
        return request.request_id


if __name__ == "__main__":
    sys.exit(main())
