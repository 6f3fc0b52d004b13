"""What a response format costs the engine with Qwen3's vocabulary: first use, compiling, a token's mask, others' wait.

For each format: CPU time to compile, and then a token at a time along a text that fits: filling the mask (in a thread,
beside the forward) and applying it to the logits (in the step). `others` is the longest pause of a thread that wakes
every millisecond while the format is compiled, against the same without compiling: the library lets go of the
interpreter. The last line is JSON.

    python -P -m expertmesh.bench.grammar"""

import json
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch

from ..cluster.attention.grammar import GrammarCompiler, GrammarState
from ..cluster.attention.sampler import banned
from ..errors import ExpertMeshError
from ..request import AnswerGrammar
from ..router.gateway.json_schema import check
from ..router.gateway.tokenizer import QWEN3_FOLDER, Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
}
FORMATS = {
    "any JSON": ("json_schema", "{}", '{"name": "Johnson", "age": [12, 13]}'),
    "object": ("json_schema", json.dumps(PERSON), '{"name": "Johnson and daughters", "age": 12, "tags": ["a"]}'),
    "maxLength 200": ("json_schema", '{"type": "string", "maxLength": 200}', '"A man, a plan, a canal"'),
    "date": ("regex", r"\d{4}-\d{2}-\d{2}", "2026-11-22"),
    "choice of 3": ("choice", '["yes", "no", "maybe"]', "maybe"),
}


@dataclass(frozen=True, slots=True)
class Costs:
    compile_s: float  # CPU
    fill_p50_us: float
    fill_max_us: float
    apply_p50_us: float
    longest_gap_ms: float


def measure(compiler: GrammarCompiler, tokenizer: Tokenizer, kind: str, source: str, text: str) -> Costs:
    grammar = AnswerGrammar(kind=kind, source=check(source) if kind == "json_schema" else source)
    found: list[Any] = []
    ended = threading.Event()

    def take(ready: Any) -> None:
        found.append(ready)
        ended.set()

    begin = time.process_time()
    compiler.compile(grammar, take)
    gap_s = _longest_gap(ended)
    compile_s = time.process_time() - begin
    if isinstance(found[0], ExpertMeshError):
        raise found[0]
    fills, applies = [], []
    logits = torch.zeros(1, tokenizer.vocab_size)
    state: GrammarState = found[0]()
    for token_id in tokenizer.encode(text):
        begin = time.perf_counter()
        mask = state.mask()  # waits for what the thread fills
        fills.append(time.perf_counter() - begin)
        assert mask is not None
        begin = time.perf_counter()
        logits[0].masked_fill_(torch.from_numpy(banned(mask, logits.shape[1])), -torch.inf)
        applies.append(time.perf_counter() - begin)
        state.accept(token_id)
    state.mask()
    return Costs(
        compile_s, statistics.median(fills) * 1e6, max(fills) * 1e6, statistics.median(applies) * 1e6, gap_s * 1e3
    )


def _longest_gap(ended: threading.Event, *, at_least_s: float = 0.2) -> float:
    """Seconds between two turns of a loop, the longest, until `ended` and for `at_least_s`."""
    first = last = time.perf_counter()
    longest = 0.0
    while not ended.is_set() or last - first < at_least_s:
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


def main() -> int:
    torch.set_num_threads(1)
    tokenizer = Tokenizer(QWEN3_FOLDER)
    compiler = GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size)
    quiet = threading.Event()
    threading.Timer(1.0, quiet.set).start()
    quiet_ms = _longest_gap(quiet) * 1e3
    first = measure(compiler, tokenizer, "choice", '["a"]', "a")
    print(
        f"first use (library and vocabulary): {first.compile_s:.2f} s; longest gap without compiling {quiet_ms:.1f} ms"
    )
    print(f"{'format':16}{'compile s':>10}{'fill p50 us':>13}{'max':>8}{'apply us':>10}{'others ms':>11}")
    figures: dict[str, Any] = {"first_use_s": round(first.compile_s, 2), "quiet_gap_ms": round(quiet_ms, 1)}
    for name, fields in FORMATS.items():
        c = measure(compiler, tokenizer, *fields)
        print(
            f"{name:16}{c.compile_s:10.3f}{c.fill_p50_us:13.0f}{c.fill_max_us:8.0f}{c.apply_p50_us:10.0f}"
            f"{c.longest_gap_ms:11.1f}"
        )
        figures[name] = {k: round(getattr(c, k), 3) for k in Costs.__slots__}
    compiler.close()
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
