"""What a token costs at the gateway between link and wire: state machine, detokenizer, deltas, the event's bytes.

One stream each of plain text, thinking, a tool call's arguments, and text with stop strings, a token a push as a decode
step brings them; one number a token, so that a slow kind of token is not hidden in a mean. Beside it the clock's own
cost. Goal: p50 <= 20 us for text, thinking and tool calls. The last line is JSON; the exit code is 1 above the goal.

    python -P -m expertmesh.bench.conversation_cost [--tokens 20000]"""

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Sequence
from time import perf_counter_ns

from ..router.gateway.conversation import Conversation, State
from ..router.gateway.events import EventWriter
from ..router.gateway.tokenizer import QWEN3_FOLDER, Tokenizer

GOAL_US = 20.0
JUDGED = ("text", "thinking", "tool call")
PROSE = (
    "The expert tier multiplies, the attention tier remembers, and the gateway only carries what they say.\n"
    "Zwölf Boxkämpfer jagen Viktor über den großen Deich. 混合专家模型把每个词元送给少数专家。\n\n"
    "def route(rows: list[int]) -> dict[str, int]:\n    return {str(r): r * 2 for r in rows}\n"
)
ARGUMENTS = (
    '"path": "/srv/data/report-2026.csv", "lines": [1, 2, 3, 40, 512], '
    '"options": {"follow": true, "note": "a \\"b\\" ü 👋"},'
)


async def measure(tokenizer: Tokenizer, kind: str, num_tokens: int) -> list[float]:
    """Microseconds of each token."""
    ids, fields = stream_of(tokenizer, kind, num_tokens)
    conversation = Conversation(tokenizer, stop_ids=tokenizer.special_ids.eos, **fields)  # type: ignore[arg-type]
    sent: list[bytes] = []

    async def write(data: bytes) -> None:
        sent.append(data)

    writer, offset, costs = EventWriter(write), 0, []
    for token_id in ids:
        begin = perf_counter_ns()
        for delta in conversation.push((token_id,)):
            offset += 1
            await writer.delta(offset, delta, with_ids=False)
        costs.append((perf_counter_ns() - begin) / 1000)
    conversation.finish()
    assert conversation.completion_tokens == len(ids)
    assert len(sent) > len(ids) / 2
    return costs


def stream_of(tokenizer: Tokenizer, kind: str, num_tokens: int) -> tuple[Sequence[int], dict[str, object]]:
    def repeat(text: str) -> list[int]:
        ids = tokenizer.encode(text)
        return (ids * (num_tokens // len(ids) + 1))[:num_tokens]

    match kind:
        case "text":
            return repeat(PROSE), {"state": State.CLOSED}
        case "thinking":
            return repeat(PROSE), {"state": State.REASONING}
        case "tool call":
            head = tokenizer.encode('<tool_call>\n{"name": "read_file", "arguments": {')
            return [*head, *repeat(ARGUMENTS)], {"state": State.CLOSED, "tools": True}
        case _:
            return repeat(PROSE), {"state": State.CLOSED, "stop": ("\nUser:", "Observation:", "</answer>", "STOP")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20_000)
    arguments = parser.parse_args()
    tokenizer = Tokenizer(QWEN3_FOLDER)
    figures: dict[str, float | bool] = {}
    clock = statistics.median(-(perf_counter_ns() - perf_counter_ns()) / 1000 for _ in range(10_000))
    print(f"{'stream':16}{'p50 us':>8}{'p99 us':>8}{'mean us':>9}   (the clock itself: {clock:.2f} us)")
    for kind in (*JUDGED, "stop strings"):
        asyncio.run(measure(tokenizer, kind, 2_000))  # the tokenizer's tables fill as tokens come
        costs = sorted(asyncio.run(measure(tokenizer, kind, arguments.tokens)))
        p50, p99, mean = statistics.median(costs), costs[int(0.99 * len(costs))], statistics.fmean(costs)
        print(f"{kind:16}{p50:8.2f}{p99:8.2f}{mean:9.2f}")
        name = kind.replace(" ", "_")
        figures |= {f"{name}_p50_us": round(p50, 2), f"{name}_p99_us": round(p99, 2), f"{name}_mean_us": round(mean, 2)}
    figures["ok"] = all(figures[f"{kind.replace(' ', '_')}_p50_us"] <= GOAL_US for kind in JUDGED)
    print(json.dumps(figures))
    return 0 if figures["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
