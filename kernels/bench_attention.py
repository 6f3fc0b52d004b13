"""Time the attention tier's kernels against the bytes that they must move, and against plain torch.

    python -P -m expertmesh.kernels.bench_attention --out attention.json

Each figure is the median over replays of a CUDA graph with many calls, each on its own weights; what a step's kernel
before would have left in the L2 (activations of few tokens) is there here too. `layer` is what one decode layer
launches besides attention and experts, in turn, with the products by the BLAS and by thin_linear. Floor: bytes read and
written once, over the read rate measured in the same run."""

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from . import attention_reference as plain
from .add_norm import add_rms_norm
from .bench_clock import DEVICE, Call, measure_read_gbps, median_us
from .combine import combine
from .combine_norm import combine_add_rms_norm
from .embed_norm import embed_rms_norm
from .gate_linear import gate_linear
from .gate_topk import gate_topk
from .qk_norm_rope import qk_norm_rope
from .sample import SLOT, admit_slots, sample_rows
from .silu_mul import silu_mul
from .thin_linear import takes, thin_linear

BF16 = torch.bfloat16
EPS = 1e-6
TOP_K, NUM_EXPERTS, VOCAB, COLUMNS, HEAD_DIM = 8, 128, 151669, 151936, 128
MANY_BYTES = 400e6  # so much is touched before the same bytes come again


@dataclass(frozen=True, slots=True)
class Model:
    hidden: int
    heads: int
    kv_heads: int

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * HEAD_DIM


MODELS = {"30b": Model(2048, 32, 4), "235b": Model(4096, 64, 4)}
RULES: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0, "top_p": 1.0},
    "top_k 20, top_p 0.95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "top_p 0.95": {"temperature": 0.6, "top_p": 0.95},
    "whole distribution": {"temperature": 1.0, "top_p": 1.0},
    "top_p 0.95 of a flat one": {"temperature": 4.0, "top_p": 0.95},
}


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    num_bytes: float
    make: Callable[[int], Call]  # the call on the n-th of its inputs
    make_plain: Callable[[int], Call] | None = None
    plain_name: str = "torch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="30b,235b")
    parser.add_argument("--tokens", default="1,8,32,128,2048")
    parser.add_argument("--only", default="", help="operations whose name has one of these parts; several with commas")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    gbps = measure_read_gbps()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, read {gbps:.0f} GB/s", flush=True)
    lines: list[dict[str, Any]] = []
    for name in options.model.split(","):
        for num_tokens in map(int, options.tokens.split(",")):
            for case in cases(MODELS[name], num_tokens):
                if options.only and not any(part in case.name for part in options.only.split(",")):
                    continue
                lines.append(measure(name, num_tokens, case, gbps))
                print(text_of(lines[-1]), flush=True)
                if options.out:
                    Path(options.out).write_text(json.dumps(lines, indent=1))
    print(json.dumps(lines))


def measure(model: str, num_tokens: int, case: Case, gbps: float) -> dict[str, Any]:
    line: dict[str, Any] = {"model": model, "T": num_tokens, "op": case.name}
    try:
        count = min(48, max(6, int(MANY_BYTES / case.num_bytes) + 1))
        line["floor_us"] = round(case.num_bytes / gbps / 1e3, 2)
        line["us"] = round(median_us([case.make(n) for n in range(count)], budget_ms=15), 2)
        if case.make_plain is not None:
            line["plain_us"] = round(median_us([case.make_plain(n) for n in range(count)], budget_ms=15), 2)
            line["plain"] = case.plain_name
    except torch.AcceleratorError:
        raise
    except Exception as error:  # what is left is still measured
        line["error"] = repr(error)[:300]
    torch.cuda.empty_cache()
    return line


def text_of(line: dict[str, Any]) -> str:
    head = f"{line['model']:5} T {line['T']:5} {line['op']:32}"
    if "error" in line:
        return f"{head} {line['error']}"
    told = f"{head} {line['us']:9.2f} us  floor {line['floor_us']:8.2f}"
    return told + (f"  {line['plain']} {line['plain_us']:9.2f}" if "plain_us" in line else "")


def cases(model: Model, num_tokens: int) -> Iterator[Case]:
    yield from _row_cases(model, num_tokens)
    if num_tokens <= 512:
        yield from _product_cases(model, num_tokens)
    if num_tokens <= 8:
        yield from _layer_cases(model, num_tokens)
    if num_tokens <= 256 and model is MODELS["30b"]:
        yield from _sampling_cases(num_tokens)


def _row_cases(model: Model, num_tokens: int) -> Iterator[Case]:
    hidden, row = model.hidden, num_tokens * model.hidden * 2
    weight = _noise(hidden)

    @functools.cache
    def rows(n: int, kind: str) -> torch.Tensor:
        return _noise(num_tokens, *((TOP_K, hidden) if kind == "y" else (hidden,)))

    yield Case(
        "add_norm",
        4 * row,
        lambda n: lambda: add_rms_norm(rows(n, "x"), rows(n, "r"), weight, EPS),
        lambda n: lambda: plain.add_rms_norm(rows(n, "x"), rows(n, "r"), weight, EPS),
    )
    shares = torch.rand(num_tokens, TOP_K, device=DEVICE)
    ids = torch.zeros(num_tokens, TOP_K, dtype=torch.int32, device=DEVICE)
    yield Case(
        "combine_norm",
        (TOP_K + 3) * row,
        lambda n: lambda: combine_add_rms_norm(rows(n, "y"), shares, rows(n, "r"), weight, EPS),
        lambda n: lambda: add_rms_norm(combine(rows(n, "y"), ids, shares), rows(n, "r"), weight, EPS),
        "combine, add_norm",
    )
    table, tokens = _noise(50_000, hidden), torch.randint(0, 50_000, (num_tokens,), device=DEVICE)
    yield Case(
        "embed_norm",
        3 * row,
        lambda n: lambda: embed_rms_norm(table, tokens, weight, EPS),
        lambda n: lambda: plain.embed_rms_norm(table, tokens, tokens, weight, EPS),
    )
    yield Case(
        "silu_mul",
        3 * num_tokens * 6144 * 2,
        lambda n: lambda: silu_mul(_gate_up(num_tokens, n)),
        lambda n: lambda: plain.silu_mul(_gate_up(num_tokens, n)),
    )
    _gate_up.cache_clear()
    heads = _Heads(model, num_tokens)
    yield Case(
        "qk_norm_rope",
        2 * num_tokens * model.qkv * 2,
        lambda n: lambda: heads.run(qk_norm_rope, n),
        lambda n: lambda: heads.run(_plain_heads, n),
    )


@functools.lru_cache(maxsize=64)
def _gate_up(num_tokens: int, n: int) -> torch.Tensor:
    return _noise(num_tokens, 2 * 6144)


class _Heads:
    def __init__(self, model: Model, num_tokens: int) -> None:
        self.model = model
        self.num_blocks = -(-num_tokens // 16)
        self.qk_norm = _noise(model.heads + model.kv_heads, HEAD_DIM)
        self.cos_sin = torch.rand(4096, HEAD_DIM, device=DEVICE)
        self.positions = torch.randint(0, 4096, (num_tokens,), device=DEVICE)
        self.slots = torch.arange(num_tokens, device=DEVICE)
        self.inputs = functools.cache(self._inputs)

    def _inputs(self, n: int) -> list[torch.Tensor]:
        qkv = _noise(self.slots.shape[0], self.model.qkv)
        return [qkv, *(_noise(self.num_blocks, 16, self.model.kv_heads, HEAD_DIM) for _ in range(2))]

    def run(self, function: Callable[..., torch.Tensor], n: int) -> torch.Tensor:
        qkv, *caches = self.inputs(n)
        sizes = {"num_heads": self.model.heads, "num_kv_heads": self.model.kv_heads}
        return function(qkv, self.qk_norm, EPS, self.cos_sin, self.positions, self.slots, *caches, **sizes)


def _plain_heads(
    qkv: torch.Tensor,
    qk_norm: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    *caches: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> torch.Tensor:
    """The reference without its boolean index, which no graph can hold."""
    heads = qkv.view(qkv.shape[0], -1, HEAD_DIM)
    normed = plain.rms_norm(heads[:, : num_heads + num_kv_heads], qk_norm, eps).float()
    cos, sin = (half[:, None] for half in cos_sin[positions].chunk(2, dim=-1))
    first, second = normed.chunk(2, dim=-1)
    turned = torch.cat([first * cos + second * -sin, second * cos + first * sin], dim=-1).to(BF16)
    for cache, values in zip(caches, (turned[:, num_heads:], heads[:, num_heads + num_kv_heads :])):
        cache.view(-1, num_kv_heads, HEAD_DIM).index_copy_(0, slots, values)
    return turned[:, :num_heads]


def _product_cases(model: Model, num_tokens: int) -> Iterator[Case]:
    sizes = {
        "qkv": (model.qkv, model.hidden),
        "o": (model.hidden, model.heads * HEAD_DIM),
        "lm_head": (COLUMNS, model.hidden),
    }
    for name, (num_outputs, k) in sizes.items():
        if num_tokens > 8 or not takes(num_outputs, k):
            continue
        weights = _weights(num_outputs, k)
        x = _noise(num_tokens, k)
        yield Case(
            f"thin_linear {name}",
            2.0 * num_outputs * k,
            _over(thin_linear, x, weights),
            _over(F.linear, x, weights),
            "BLAS",
        )
        weights.cache_clear()
    gates = _weights(NUM_EXPERTS, model.hidden)
    x = _noise(num_tokens, model.hidden)
    yield Case(
        "gate_linear",
        2.0 * NUM_EXPERTS * model.hidden,
        lambda n: lambda: gate_linear(x, gates(n), TOP_K),
        lambda n: lambda: gate_topk(F.linear(x, gates(n)), TOP_K),
        "BLAS, gate_topk",
    )


def _weights(num_outputs: int, k: int) -> Any:
    return functools.cache(lambda n: _noise(num_outputs, k, scale=0.02))


def _over(product: Callable[..., torch.Tensor], x: torch.Tensor, weights: Any) -> Callable[[int], Call]:
    return lambda n: lambda: product(x, weights(n))


def _layer_cases(model: Model, num_tokens: int) -> Iterator[Case]:
    """add_norm, qkv, qk_norm_rope, (attention), o, add_norm, gate, each layer with its own weights."""
    heads, weight = _Heads(model, num_tokens), _noise(model.hidden)
    q_size = model.heads * HEAD_DIM
    x, residual = _noise(num_tokens, model.hidden), _noise(num_tokens, model.hidden)

    @functools.cache
    def weights(n: int) -> tuple[torch.Tensor, ...]:
        shapes = ((model.qkv, model.hidden), (model.hidden, q_size), (NUM_EXPERTS, model.hidden))
        return tuple(_noise(*shape, scale=0.02) for shape in shapes)

    def layer(n: int, product: Callable[..., torch.Tensor]) -> None:
        qkv_weight, o_weight, gate = weights(n)
        normed = add_rms_norm(x, residual, weight, EPS)
        qkv = product(normed, qkv_weight)
        _, *caches = heads.inputs(n)
        q = qk_norm_rope(
            qkv,
            heads.qk_norm,
            EPS,
            heads.cos_sin,
            heads.positions,
            heads.slots,
            *caches,
            num_heads=model.heads,
            num_kv_heads=model.kv_heads,
        ).view(num_tokens, q_size)
        o = product(q, o_weight) if takes(model.hidden, q_size) else F.linear(q, o_weight)
        normed = add_rms_norm(o, residual, weight, EPS)
        if product is F.linear:
            gate_topk(F.linear(normed, gate), TOP_K)
        else:
            gate_linear(normed, gate, TOP_K)

    num_bytes = 2.0 * model.hidden * (model.qkv + q_size + NUM_EXPERTS)
    yield Case("layer", num_bytes, _bind(layer, thin_linear), _bind(layer, F.linear), "BLAS")


def _bind(layer: Callable[..., None], product: Callable[..., torch.Tensor]) -> Callable[[int], Call]:
    return lambda n: lambda: layer(n, product)


def _sampling_cases(num_rows: int) -> Iterator[Case]:
    logits = functools.cache(lambda n: _noise(num_rows, COLUMNS, scale=3.0))
    slots = torch.arange(num_rows, dtype=torch.int32, device=DEVICE)
    for name, rule in RULES.items():
        state = torch.zeros(num_rows, 512, dtype=torch.uint8, device=DEVICE)
        last_token = torch.zeros(num_rows, dtype=torch.int64, device=DEVICE)
        records = torch.zeros(num_rows, 512, dtype=torch.uint8)
        staged = records.numpy().view(SLOT)[:, 0]
        for field, value in rule.items():
            staged[field] = value
        staged["slot"], staged["seed"], staged["cursor"] = range(num_rows), range(num_rows), -1
        admit_slots(records.to(DEVICE), state, last_token)
        yield Case(
            f"sample, {name}",
            2.0 * num_rows * VOCAB,
            _sampling(logits, slots, state, last_token),
            _arg_max(logits) if name == "greedy" else None,
        )


def _sampling(logits: Any, slots: torch.Tensor, *state: torch.Tensor) -> Callable[[int], Call]:
    return lambda n: lambda: sample_rows(logits(n), VOCAB, slots, *state)


def _arg_max(logits: Any) -> Callable[[int], Call]:
    return lambda n: lambda: logits(n)[:, :VOCAB].argmax(-1)


def _noise(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=BF16) * scale


if __name__ == "__main__":
    main()
