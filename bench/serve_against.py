"""What a cluster costs beside its engine alone: figures of `bench.step` against those of a fixed load. Pure.

An engine alone has no gateway, link, Ray or client. Where the load is a closed loop of as many streams as the engine's
batch, the tokens a second of both while all streams run are compared (goal: 0.95 or more), and with one stream the time
to its first token against the engine's prefill of such a prompt (goal: 5 ms more at most)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GOAL_SHARE, GOAL_TTFT_MS = 0.95, 5.0


@dataclass(frozen=True, slots=True)
class Engine:
    """Of one model on one device."""

    tokens_per_s: Mapping[int, float]  # by batch
    prefill_ms: Mapping[tuple[int, int], float]  # by prompts and their tokens, until each has its first token

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> "Engine":
        """From the last line of `bench.step`."""
        return cls(
            {d["batch"]: d["tokens_per_s"] for d in report["decode"]},
            {(p["num_prompts"], p["prompt_tokens"]): p["ms"] for p in report["prefill"]},
        )


def beside(row: Mapping[str, Any], engine: Engine) -> dict[str, float | bool]:
    """What is to be added to a row of `bench.serve`; empty where the engine was not measured so."""
    found: dict[str, float | bool] = {}
    if row["mix"] != "fixed":
        return found
    alone = engine.tokens_per_s.get(row["streams"])
    if alone and row["decode_tokens_per_s"]:
        share = row["decode_tokens_per_s"] / alone
        found |= {"engine_tokens_per_s": alone, "share_of_engine": round(share, 4), "share_met": share >= GOAL_SHARE}
    first = engine.prefill_ms.get((row["streams"], row["prompt_tokens"]))
    if first:
        more = row["ttft_ms_p50"] - first
        found |= {"engine_ttft_ms": first, "ttft_overhead_ms": round(more, 2), "ttft_met": more <= GOAL_TTFT_MS}
    return found
