"""Exactness under memory pressure: 64 concurrent mixed requests on a KV pool that holds a third of them.

`make preemption`. Greedy and sampled requests, shared prefixes, thinking budgets, short and long. Every stream must
equal its solo run; afterwards every block is free. Exit 1 otherwise. The last line is JSON."""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import CacheConfig, SchedulerConfig
from ..make_checkpoint import PRESETS, make_checkpoint
from ..request import EngineRequest, SamplingParams, ThinkingBudget
from .local_engine import LocalEngine


def mixed_requests(count: int, vocab_size: int, *, longest: int, seed: int = 1) -> list[EngineRequest]:
    rng = random.Random(seed)
    shared = tuple(rng.randrange(vocab_size) for _ in range(longest // 2))
    budget = ThinkingBudget(budget_tokens=6, think_id=3, end_think_id=4, closing_ids=(5, 6, 4, 7), starts_inside=True)
    requests = []
    for i in range(count):
        own = tuple(rng.randrange(vocab_size) for _ in range(rng.randint(1, longest // 3)))
        sampling = SamplingParams(
            temperature=(0.0, 0.6, 1.0)[i % 3],
            top_k=(0, 20)[i % 2],
            top_p=0.95,
            seed=1000 + i,
            presence_penalty=(0.0, 0.0, 0.0, 0.7)[i % 4],
            max_tokens=rng.randint(longest // 2, longest),  # outlives the room left at admission
        )
        prompt = shared + own if i % 4 == 0 else own
        thinking = budget if i % 5 == 0 else None
        requests.append(EngineRequest(request_id=f"r{i}", prompt_ids=prompt, sampling=sampling, thinking=thinking))
    return requests


def blocks_of(requests: Sequence[EngineRequest], block_size: int) -> int:
    """KV blocks that would hold all of them at once."""
    return sum(-(-(len(r.prompt_ids) + r.sampling.max_tokens) // block_size) for r in requests)


def run(
    folder: str | Path, *, count: int = 64, longest: int = 128, block_size: int = 16, kv_dtype: Any = "auto"
) -> dict[str, object]:
    """Solo runs with room and no prefix cache, then all at once on a third of the room, chunked."""
    roomy = CacheConfig(num_blocks=64, block_size=16, kv_dtype=kv_dtype, enable_prefix_cache=False)
    with LocalEngine(folder, cache=roomy) as solo:
        vocab_size = solo.engine.vocab_size
        requests = mixed_requests(count, vocab_size, longest=longest)
        alone = [solo.run([request])[0].token_ids for request in requests]
    needed = blocks_of(requests, block_size)
    scheduler = SchedulerConfig(max_num_batched_tokens=160, max_prefill_tokens_per_step=100)
    started = time.perf_counter()
    scarce = CacheConfig(num_blocks=needed // 3, block_size=block_size, kv_dtype=kv_dtype)
    with LocalEngine(folder, cache=scarce, scheduler=scheduler) as busy:
        together = busy.run(requests)
        seconds = time.perf_counter() - started
        balanced = busy.books_balance and busy.engine.wait_until_idle(10)
        num_preemptions = busy.engine.scheduler.num_preemptions
    busy.engine.scheduler.check_integrity()
    different = [r.request_id for r, a, t in zip(requests, alone, together) if a != t.token_ids]
    return {
        "requests": count,
        "kv_blocks": needed // 3,
        "kv_blocks_of_all": needed,
        "tokens": sum(map(len, alone)),
        "preemptions": num_preemptions,
        "streams_that_differ": len(different),
        "different": different[:8],
        "all_blocks_free": balanced,
        "seconds": round(seconds, 2),
        "ok": not different and balanced and num_preemptions > 0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder (default: a seeded random small one)")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--kv-dtype", choices=("auto", "bf16", "fp8"), default="auto")
    options = parser.parse_args()
    torch.set_num_threads(1)  # what batch-invariant mode stands on
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or scratch
        if not options.model:
            make_checkpoint(scratch, {**PRESETS["tiny-moe"], "vocab_size": 8192}, seed=3)
        figures = run(folder, count=options.requests, kv_dtype=options.kv_dtype)
    print(json.dumps(figures))
    return 0 if figures["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
