"""What the prefix cache saves: turn 2 of a 2,000-token conversation against turn 1, time to first token in the engine.

`make prefix`. Turn 2's prompt is turn 1's prompt and output and a new message. Its cached tokens must be at least the
common prefix less one block, its time to first token at most 0.3 of turn 1's, and its text that of an engine without a
cache. Exit 1 otherwise. The last line is JSON."""

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from ..config import CacheConfig
from ..make_checkpoint import make_checkpoint
from ..request import EngineRequest, SamplingParams
from .local_engine import LocalEngine, Stream

MAX_RATIO = 0.3


def run(folder: str | Path, *, prompt_tokens: int = 2000, repeats: int = 3) -> dict[str, object]:
    cache = CacheConfig(num_blocks=4 * (prompt_tokens + 200) // 16)
    ratios, firsts, seconds, cached, common, same = [], [], [], [], [], []
    with (
        LocalEngine(folder, cache=cache) as engine,
        LocalEngine(folder, cache=CacheConfig(num_blocks=cache.num_blocks, enable_prefix_cache=False)) as plain,
    ):
        vocab_size = engine.engine.vocab_size

        def turn(on: LocalEngine, name: str, prompt: tuple[int, ...]) -> Stream:
            sampling = SamplingParams(max_tokens=48)
            return on.run([EngineRequest(request_id=name, prompt_ids=prompt, sampling=sampling)])[0]

        turn(engine, "warm-up", (1,) * 40)
        for i in range(repeats):
            rng = random.Random(i)
            prompt = tuple(rng.randrange(vocab_size) for _ in range(prompt_tokens))
            first = turn(engine, f"{i} turn 1", prompt)
            prefix = prompt + tuple(first.token_ids)
            follow_up = prefix + tuple(rng.randrange(vocab_size) for _ in range(24))
            second = turn(engine, f"{i} turn 2", follow_up)
            reference = turn(plain, f"{i} turn 2", follow_up)
            firsts.append(first.time_to_first_token_s)
            seconds.append(second.time_to_first_token_s)
            ratios.append(second.time_to_first_token_s / first.time_to_first_token_s)
            cached.append(second.num_cached_tokens)
            common.append(len(prefix))
            same.append(second.token_ids == reference.token_ids)
        balanced = engine.books_balance
    ratio = statistics.median(ratios)
    enough = all(c >= p - cache.block_size for c, p in zip(cached, common))
    return {
        "prompt_tokens": prompt_tokens,
        "common_prefix_tokens": common[0],
        "cached_tokens": min(cached),
        "ttft_turn1_ms": round(1e3 * statistics.median(firsts), 2),
        "ttft_turn2_ms": round(1e3 * statistics.median(seconds), 2),
        "ttft_ratio": round(ratio, 4),
        "max_ratio": MAX_RATIO,
        "same_text_without_cache": all(same),
        "all_blocks_free": balanced,
        "cached_enough": enough,
        "ok": ratio <= MAX_RATIO and enough and all(same) and balanced,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder (default: a seeded random small one)")
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)  # what batch-invariant mode stands on
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or scratch
        if not options.model:
            make_checkpoint(scratch, "small-moe", seed=3)
        figures = run(folder, prompt_tokens=options.prompt_tokens)
    print(json.dumps(figures))
    return 0 if figures["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
