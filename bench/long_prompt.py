"""A long prompt beside short streams: what it does to their inter-token time, and how long it takes itself.

After a replica's own warm-up short streams decode undisturbed; then prompts of 32K and 128K tokens (YaRN) come, one
after the other, while they go on. Chunks of a long prompt share steps with the decodes, so their size sets everybody's
time; the scheduler makes them smaller as the context grows (`scheduler.py`). Goal: p99 at most 3 x undisturbed.
The last line is JSON.

    python -m expertmesh.bench.long_prompt --prompts 32768,131000 --streams 32"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..cluster.attention.warm_up import OUTPUT, lengths
from ..config import CacheConfig, SchedulerConfig
from ..request import EngineRequest, SamplingParams
from .local_engine import LocalEngine, Stream
from .step_cases import CASES, open_case

GOAL = 3.0  # x undisturbed p99
UNDISTURBED_S = 3.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=tuple(CASES), default="30b-128k")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompts", type=lambda text: [int(n) for n in text.split(",")], default=[32768, 131000])
    parser.add_argument("--chunk", type=int, default=1024, help="scheduler.max_prefill_tokens_per_step")
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_case(arguments.case, Path(folder))
        longest = max(arguments.prompts) + 64
        scheduler = SchedulerConfig(
            max_num_seqs=arguments.streams + 1,
            max_num_batched_tokens=max(2048, arguments.chunk + arguments.streams),
            max_prefill_tokens_per_step=arguments.chunk,
        )
        on_gpu = arguments.device != "cpu"
        kv_bytes = 0 if on_gpu else 2 * longest * checkpoint.config.kv_bytes_per_token(4)
        engine = LocalEngine(
            checkpoint,
            cache=CacheConfig(enable_prefix_cache=False, kv_memory_bytes=max(kv_bytes, 64 << 20)),
            scheduler=scheduler,
            batch_invariant=not on_gpu,
            device=arguments.device,
            max_model_len=longest + 1,
        )
        with engine:
            vocab_size = min(checkpoint.config.vocab_size, engine.engine.vocab_size)
            warm_up(engine, scheduler, longest, vocab_size)
            result = measure(engine, arguments.streams, arguments.prompts, vocab_size)
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    print(json.dumps({"device": name, "streams": arguments.streams, "chunk": arguments.chunk} | result))
    return 0 if all(p["complete"] for p in result["prompts"]) else 1


def warm_up(engine: LocalEngine, scheduler: SchedulerConfig, longest: int, vocab_size: int) -> None:
    """The requests by which a replica gets warm."""
    draw = np.random.default_rng(1)
    for turn, length in enumerate(lengths(scheduler, longest)):
        ids = tuple(draw.integers(0, vocab_size, length).tolist())
        sampling = SamplingParams(max_tokens=OUTPUT)
        engine.run([EngineRequest(request_id=f"warm{turn}", prompt_ids=ids, sampling=sampling)])


def measure(engine: LocalEngine, num_streams: int, prompts: Sequence[int], vocab_size: int) -> dict[str, object]:
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
    found = []
    for length in prompts:
        began = time.perf_counter()
        stream = engine.submit(request(f"long{length}", length, 2))
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
                "times_undisturbed": p99 / (1e3 * float(np.quantile(undisturbed, 0.99))),
                "complete": len(stream.token_ids) == 2,
            }
        )
        print(found[-1], flush=True)
    company.stop()
    return {
        "undisturbed_p50_ms": 1e3 * statistics.median(undisturbed),
        "undisturbed_p99_ms": 1e3 * float(np.quantile(undisturbed, 0.99)),
        "prompts": found,
        "goal_times_undisturbed": GOAL,
        "goal_met": all(float(str(p["times_undisturbed"])) <= GOAL for p in found),
    }


class _Company:
    """Short streams, each replaced by another when it ends."""

    def __init__(self, engine: LocalEngine, make, count: int) -> None:  # type: ignore[no-untyped-def]
        self._engine, self._make, self._count = engine, make, count
        self._streams: list[Stream] = []
        self._ended = False
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(count)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._ended = True
        for thread in self._threads:
            thread.join()

    def gaps(self, began: float, ended: float) -> list[float]:
        """Seconds between two tokens of one stream, of tokens that came in this time."""
        times = [[t for t in list(s.token_times_s) if began <= t <= ended] for s in list(self._streams)]
        return [gap for one in times for gap in np.diff(one).tolist()]

    def _run(self, i: int) -> None:
        turn = 0
        while not self._ended:
            request = self._make(i + self._count * turn)
            self._streams.append(self._engine.submit(request))
            self._engine.wait([request.request_id])
            turn += 1


if __name__ == "__main__":
    sys.exit(main())
