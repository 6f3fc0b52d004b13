"""Serving speed of a small MoE through gRPC against transformers' batched generate: same checkpoint, machine and run.

`make bench`. Ours: one gateway, one attention replica, two expert shards, a client process, greedy, ignore_eos. Theirs:
`generate` on one batch, the same prompts and lengths. Both get the machine's cores. Goal: ahead at 8 and 32 concurrent.
The last line is JSON; exit 1 where a stream is short or an answer differs in length, never for speed."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from ..config import ClusterConfig
from .serve_clients import play
from .serve_figures import Objective, Record, figures, wrong
from .serve_mixes import Mix, fixed
from .serve_target import REPORT_S, SMALL_MOE_SHAPE, small_moe, started, steps_of

VOCAB = 150_000
SHOWN = ("tokens_per_s", "ttft_ms_p50", "itl_ms_p50", "itl_ms_p99")


def batch(concurrency: int, prompt_tokens: int, output_tokens: int, seed: int = 0) -> Mix:
    return fixed(concurrency, prompt_tokens, output_tokens, vocab=VOCAB, seed=seed)


def shown(records: list[Record], begun_s: float) -> dict[str, float | None]:
    found = figures(records, begun_s, Objective()).as_dict()
    return {name: found[name] for name in SHOWN}


def run_transformers(folder: Path, mix: Mix, threads: int) -> dict[str, float | None]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    times: list[float] = []
    asks = [script.asks[0] for script in mix.scripts]
    ids = torch.tensor([ask.token_ids for ask in asks])

    class Clock(StoppingCriteria):
        def __call__(self, ids, scores, **_):
            times.append(time.monotonic())
            return torch.zeros(ids.shape[0], dtype=torch.bool)

    def generate() -> float:
        times.clear()
        begun_s = time.monotonic()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=asks[0].max_tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Clock()]),
            )
        return begun_s

    generate()  # warm-up
    begun_s = generate()
    arrivals = [(at, 1, False) for at in times]
    return shown([Record(i, 0, begun_s, begun_s, list(arrivals)) for i in range(len(asks))], begun_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of transformers")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    arguments = parser.parse_args()
    shape = (arguments.prompt_tokens, arguments.output_tokens)

    rows, faults = [], []
    with small_moe(ClusterConfig(num_expert_shards=arguments.shards)) as config:
        peers = {}
        if not arguments.no_peer:
            for n in arguments.concurrency:
                peers[n] = run_transformers(Path(config.model), batch(n, *shape, seed=n), arguments.threads)
        with started(config, SMALL_MOE_SHAPE) as target:
            play(batch(2, 16, 8), target.gateways, 1)  # warm-up
            for n in arguments.concurrency:
                before = steps_of(target.gateways[0])
                begun_s, records = play(batch(n, *shape, seed=n), target.gateways, 1)
                time.sleep(REPORT_S)
                steps = steps_of(target.gateways[0]) - before
                row = {"concurrency": n, "expertmesh": shown(records, begun_s)}
                row["exchange_share_of_step"] = round(steps.exchange_s / steps.step_s, 3) if steps.step_s else None
                if n in peers:
                    row["transformers"] = peers[n]
                    row["ratio_tokens_per_s"] = round(row["expertmesh"]["tokens_per_s"] / peers[n]["tokens_per_s"], 3)
                print(json.dumps(row), flush=True)
                rows.append(row)
                faults += wrong(records)
    for fault in faults[:5]:
        print(fault, file=sys.stderr)
    print(
        json.dumps(
            {
                "bench": "serve_transformers",
                "device": f"cpu, {os.cpu_count()} cores",
                "shape": SMALL_MOE_SHAPE,
                "shards": arguments.shards,
                "prompt_tokens": arguments.prompt_tokens,
                "output_tokens": arguments.output_tokens,
                "rows": rows,
            }
        )
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
