"""What KV in bf16 or e4m3 changes in the demo model's logits, on a CPU, beside KV in float32.

    python -P -m expertmesh.bench.kv_dtype [--items-per-task 3]

Held-out questions with thinking, answered greedily over float32 KV; the same tokens are then read in one step over each
kind of KV, and the logits of all tokens of the answers are compared: relative norm of the difference, how often another
token is the best, the nats that the choice among all tokens moves (Kullback-Leibler), and the largest numbers that KV
holds, of 448. The last line is JSON."""

import argparse
import json

import torch

from ..deploy.demo_model.evaluate import held_out_items, play
from ..deploy.demo_model.rendering import Codec
from ..deploy.demo_model.served import CHECKPOINT
from .in_process import InProcessModel

KINDS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items-per-task", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)  # what batch-invariant mode stands on
    codec = Codec(CHECKPOINT)
    requests = [next(play(item, "think", None)) for item in held_out_items(items_per_task=options.items_per_task)]
    prompts = [codec.prompt(r.messages, r.tools, r.enable_thinking) for r in requests]
    exact = InProcessModel(CHECKPOINT, num_blocks=2048)
    texts = [prompt + _answer(exact, prompt, codec.end_id) for prompt in prompts]
    logits = {name: _logits(InProcessModel(CHECKPOINT, kv_dtype=kind), texts, prompts) for name, kind in KINDS.items()}
    k, v = (max(float(pages[which].abs().max()) for pages in exact.kv_cache) for which in (0, 1))
    found = {"num_tokens": len(logits["float32"]), "largest_k": round(k, 1), "largest_v": round(v, 1)}
    found |= {name: compare(logits[name], logits["float32"]) for name in ("bf16", "fp8")}
    print(json.dumps(found))


def compare(logits: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    errors = (logits - exact).norm(dim=1) / exact.norm(dim=1)
    moved = (exact.softmax(1) * (exact.log_softmax(1) - logits.log_softmax(1))).sum(1)
    return {
        "relative_median": round(float(errors.median()), 6),
        "relative_p99": round(float(errors.quantile(0.99)), 6),
        "relative_max": round(float(errors.max()), 6),
        "other_best_share": round(float((logits.argmax(1) != exact.argmax(1)).double().mean()), 6),
        "nats_mean": round(float(moved.mean()), 8),
    }


def _answer(model: InProcessModel, prompt: list[int], end_id: int, most: int = 400) -> list[int]:
    stream = model.open(prompt, num_tokens=len(prompt) + most)
    count = len(prompt)
    while len(stream.tokens) < len(prompt) + most and stream.tokens[-1] != end_id:
        stream.tokens.append(int(model.run([(stream, count)])[0][0].argmax()))
        count = 1
    model.close(stream)
    return stream.tokens[len(prompt) :]


def _logits(model: InProcessModel, texts: list[list[int]], prompts: list[list[int]]) -> torch.Tensor:
    """[tokens of all answers, vocab]: what each was chosen by."""
    rows = []
    for text, prompt in zip(texts, prompts):
        stream = model.open(text)
        rows.append(model.run([(stream, len(text))], all_rows=True)[0][len(prompt) - 1 : -1])
        model.close(stream)
    return torch.cat(rows)


if __name__ == "__main__":
    main()
