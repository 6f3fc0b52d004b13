"""Time the dense products of an fp8 checkpoint's attention tier, each way that there is, beside the bf16 weights.

    python -P -m expertmesh.kernels.bench_dense_fp8 --out dense_fp8.json

Microseconds of one call in a CUDA graph of as many calls as touch 400 MB of weights, so that none come from the L2; x
stays there, as in a step. Floor: the fp8 weights once over the read rate of the same run."""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .bench_clock import DEVICE, measure_read_gbps, median_us
from .dense_fp8 import BLOCK, E4M3, Fp8Weight, dense_fp8, pack_fp8
from .dense_w8a8 import TILES, dense_w8a8
from .dense_w8a8_few import dense_w8a8_few
from .dequantize_fp8 import dequantize_fp8
from .thin_linear import MAX_ROWS, takes, thin_linear

BF16 = torch.bfloat16
SHAPES = {"qkv": (9216, 4096), "o": (4096, 8192)}  # Qwen3-235B-A22B: N, K
TOKENS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 256, 512, 2048)
MANY_BYTES = 400e6
Product = Callable[[torch.Tensor, Any], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=TOKENS)
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    gbps = measure_read_gbps()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, read {gbps:.0f} GB/s", flush=True)
    lines = []
    for name, (num_outputs, k) in SHAPES.items():
        fp8 = functools.cache(lambda n, shape=(num_outputs, k): _weight(*shape))
        bf16 = functools.cache(lambda n, make=fp8: dequantize_fp8(make(n)))
        for num_tokens in options.tokens:
            x = torch.randn(num_tokens, k, device=DEVICE).to(BF16)
            floor_us = num_outputs * k / gbps / 1e3
            line: dict[str, Any] = {"product": name, "T": num_tokens, "floor_us": round(floor_us, 2)}
            for way, product, weights in _ways(num_tokens, num_outputs, k, fp8, bf16):
                try:
                    line[way] = round(_time(product, x, weights, num_outputs * k), 2)
                except torch.AcceleratorError:
                    raise
                except Exception as error:  # what is left is still measured
                    line[way] = repr(error)[:200]
            lines.append(line)
            print(_text(line, num_outputs * k), flush=True)
            if options.out:
                Path(options.out).write_text(json.dumps(lines, indent=1))
        fp8.cache_clear()
        bf16.cache_clear()
        torch.cuda.empty_cache()
    print(json.dumps(lines))


def _ways(num_tokens: int, num_outputs: int, k: int, fp8: Any, bf16: Any) -> list[tuple[str, Product, Any]]:
    ways: list[tuple[str, Product, Any]] = [("bf16 BLAS", F.linear, bf16)]
    if num_tokens <= MAX_ROWS and takes(num_outputs, k):
        ways.append(("bf16 thin", thin_linear, bf16))
    if num_tokens <= 32:
        ways.append(("w8a16", dense_fp8, fp8))
    if num_tokens <= 256:
        ways.append(("w8a8 few", dense_w8a8_few, fp8))
    if num_tokens > 64:
        ways.append(("dequantised", lambda x, w: F.linear(x, dequantize_fp8(w)), fp8))
        ways += [(f"w8a8/{tile}", functools.partial(dense_w8a8, tile=tile), fp8) for tile in TILES]
    return ways


def _weight(num_outputs: int, k: int) -> Fp8Weight:
    values = (torch.randn(num_outputs, k, device=DEVICE) * 60).clamp(-448, 448).to(E4M3)
    return pack_fp8(values, torch.full((num_outputs // BLOCK, k // BLOCK), 2.5e-4, device=DEVICE))


def _time(product: Product, x: torch.Tensor, weights: Any, num_bytes: int) -> float:
    count = max(6, int(MANY_BYTES / num_bytes) + 1)
    return median_us([functools.partial(product, x, weights(n)) for n in range(count)], budget_ms=15)


def _text(line: dict[str, Any], num_bytes: int) -> str:
    told = f"{line['product']:4} T {line['T']:5} floor {line['floor_us']:6.2f}"
    for way, us in line.items():
        if way in ("product", "T", "floor_us"):
            continue
        if isinstance(us, str):
            told += f"  {way} {us}"
            continue
        read = num_bytes * (2 if way.startswith("bf16") else 1)
        told += f"  {way} {us:8.2f} ({read / us / 1e3:5.0f} GB/s, {us / line['floor_us']:5.2f} x)"
    return told


if __name__ == "__main__":
    main()
