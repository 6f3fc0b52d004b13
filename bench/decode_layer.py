"""What a decode layer costs besides its gate and experts, with attention in two launches or in one, microseconds:

    python -P -m expertmesh.bench.decode_layer [--model 30b,235b-fp8] [--tokens 1,2,4,8] [--contexts 192,512,1024,4096]

`two`: `qk_norm_rope` and the planned attention; `one`: `decode_attention` as a step has it, or with each of `--shares`
(CTAs of a cluster x warps x units on their way). `layer`: norm, qkv product, either, output product, norm, each layer
with weights and KV of its own, out of L2. One CUDA graph of all layers each; one launch overlaps the next as in a
step."""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cluster.attention import flash
from ..cluster.attention.products import PlainProducts, Weight
from ..kernels.add_norm import add_rms_norm
from ..kernels.bench_clock import measure_read_gbps, median_us
from ..kernels.decode_attention import Share, decode_attention
from ..kernels.dense_fp8 import pack_fp8
from ..kernels.qk_norm_rope import Projected, qk_norm_rope

HEAD_DIM, BLOCK_SIZE, EPS = 128, 16, 1e-6
BF16, E4M3, DEVICE = torch.bfloat16, torch.float8_e4m3fn, "cuda"
_CACHE_BYTES = 200 << 20  # of KV and weights that one graph reads at least: four times an L2
_product = PlainProducts()


@dataclass(frozen=True, slots=True)
class Model:
    hidden: int
    heads: int
    kv_heads: int
    fp8: bool

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * HEAD_DIM


MODELS = {"30b": Model(2048, 32, 4, False), "235b-fp8": Model(4096, 64, 4, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="30b,235b-fp8")
    parser.add_argument("--tokens", default="1,2,4,8")
    parser.add_argument("--contexts", default="192,512,1024,4096")
    parser.add_argument("--shares", default="", help="CTAsxWARPSxUNITS,... instead of what a step has")
    parser.add_argument("--kv-dtype", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    flash.FEW_REQUESTS = 0  # so that `two` is planned as contexts beyond the limit are
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, read {measure_read_gbps():.0f} GB/s", flush=True)
    shares = [Share(*map(int, text.split("x"))) for text in options.shares.split(",") if text]
    lines: list[dict[str, Any]] = []
    for name in options.model.split(","):
        for num_tokens in map(int, options.tokens.split(",")):
            for context in map(int, options.contexts.split(",")):
                layers = Layers(MODELS[name], num_tokens, context, E4M3 if options.kv_dtype == "fp8" else BF16)
                line: dict[str, Any] = {"model": name, "T": num_tokens, "context": context}
                for what, us in layers.measure(shares):
                    line[what] = round(us, 2)
                lines.append(line)
                print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
                if options.out:
                    Path(options.out).write_text(json.dumps(lines, indent=1))


class Layers:
    """As many layers as keep their weights and KV out of L2."""

    def __init__(self, model: Model, num_tokens: int, context: int, kv_dtype: torch.dtype) -> None:
        self.model, self.num_tokens, self.context = model, num_tokens, context
        width = -(-context // BLOCK_SIZE)
        kv_bytes = 2 * num_tokens * context * model.kv_heads * HEAD_DIM * kv_dtype.itemsize
        self.num_caches = min(256, max(12, -(-_CACHE_BYTES // kv_bytes)))
        shape = (self.num_caches, 2, num_tokens * width, BLOCK_SIZE, model.kv_heads, HEAD_DIM)
        self.caches = torch.empty(shape, dtype=BF16, device=DEVICE).normal_().to(kv_dtype)
        self.attention = flash.FlashAttention(
            *(model.heads, model.kv_heads, HEAD_DIM, BLOCK_SIZE, DEVICE),
            kv_dtype=kv_dtype,
            max_num_reqs=num_tokens,
            max_num_blocks=width,
        )
        table = np.random.default_rng(0).permutation(num_tokens * width).astype(np.int32).reshape(num_tokens, width)
        lens = np.full(num_tokens, context, np.int32)
        self.attention.plan(np.ones(num_tokens, np.int32), lens, table, bucket=num_tokens)
        position = torch.full((num_tokens,), context - 1, device=DEVICE)
        self.requests = (
            torch.from_numpy(lens).to(DEVICE),
            torch.arange(num_tokens, dtype=torch.int32, device=DEVICE) * width,
            torch.from_numpy(table.flatten()).to(DEVICE),
        )
        last = torch.from_numpy(table[:, -1].astype(np.int64)).to(DEVICE)
        self.rest = (
            _noise(model.heads + model.kv_heads, HEAD_DIM),
            EPS,
            torch.rand(context, HEAD_DIM, device=DEVICE),
            position,
            last * BLOCK_SIZE + (context - 1) % BLOCK_SIZE,
        )
        self.qkv = _noise(num_tokens, model.qkv)
        self.heads = {"num_heads": model.heads, "num_kv_heads": model.kv_heads}
        self.x, self.residual = _noise(num_tokens, model.hidden), _noise(num_tokens, model.hidden)
        self.norm = _noise(model.hidden)
        self.weights = [self._weights() for _ in range(12)]

    def measure(self, shares: list[Share]) -> Iterator[tuple[str, float]]:
        ways: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {"two": self._two}
        ways |= {"one " + "x".join(map(str, share)): self._one(share) for share in shares}
        ways |= {} if shares else {"one": self._one(None)}
        for name, way in ways.items():
            yield name, median_us([_bind(way, self.qkv, n) for n in range(self.num_caches)], budget_ms=15)
        for name, way in ways.items():
            yield f"layer {name}", median_us([_bind(self._layer, way, n) for n in range(12)], budget_ms=15)

    def _two(self, qkv: torch.Tensor, n: int) -> torch.Tensor:
        k, v = self.caches[n]
        q = qk_norm_rope(*Projected(qkv, *self.rest), k, v, **self.heads)
        return self.attention.attend(q, k, v)

    def _one(self, share: Share | None) -> Callable[[torch.Tensor, int], torch.Tensor]:
        how: dict[str, Any] = {"share": share, **self.heads}

        def call(qkv: torch.Tensor, n: int) -> torch.Tensor:
            return decode_attention(*Projected(qkv, *self.rest), *self.caches[n], *self.requests, **how)

        return call

    def _layer(self, way: Callable[[torch.Tensor, int], torch.Tensor], n: int) -> None:
        qkv, o = self.weights[n]
        normed = add_rms_norm(self.x, self.residual, self.norm, EPS)
        mixed = way(_product(normed, qkv), n).view(self.num_tokens, -1)
        add_rms_norm(_product(mixed, o), self.residual, self.norm, EPS)

    def _weights(self) -> tuple[Weight, Weight]:
        shapes = (self.model.qkv, self.model.hidden), (self.model.hidden, self.model.heads * HEAD_DIM)
        if not self.model.fp8:
            return _noise(*shapes[0]), _noise(*shapes[1])
        one, two = (pack_fp8(_noise(*shape).to(torch.float8_e4m3fn), _scales(*shape)) for shape in shapes)
        return one, two


def _scales(num_outputs: int, k: int) -> torch.Tensor:
    return torch.full((num_outputs // 128, k // 128), 0.02, device=DEVICE)


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=BF16) * 0.02


def _bind(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


if __name__ == "__main__":
    main()
