"""What the bench measures with: microseconds by CUDA-graph replays, and the machine's own ceilings in the same run."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .jit import Kernel

Call = Callable[[], Any]
DEVICE = "cuda"
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Floors are work over these: the best that this machine did in this run, not a data sheet's."""

    read_gbps: float
    bf16_tflops: float
    fp8_tflops: float


def measure_ceilings() -> Ceilings:
    gbps = measure_read_gbps()
    m = 8192
    a, b = (torch.randn(m, m, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    bf16_us = median_us([lambda: torch.mm(a, b.t())], 300)
    qa, qb = a.to(FP8), b.to(FP8)
    ra, rb = torch.ones(m, 1, device=DEVICE), torch.ones(1, m, device=DEVICE)
    fp8_us = median_us(
        [lambda: torch._scaled_mm(qa, qb.t(), ra, rb, out_dtype=torch.bfloat16, use_fast_accum=True)], 300
    )
    return Ceilings(round(gbps, 1), round(2 * m**3 / bf16_us / 1e6, 1), round(2 * m**3 / fp8_us / 1e6, 1))


def measure_read_gbps() -> float:
    """4 GB read once by a kernel that does nothing else."""
    x = torch.randint(0, 2**31 - 1, (1 << 30,), dtype=torch.int32, device=DEVICE)
    sink = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    read = Kernel("bench_ceiling.cu", "read_all")
    count = np.int64(x.numel() // 4)
    grid = (4 * torch.cuda.get_device_properties(0).multi_processor_count,)
    return 4 * x.numel() / median_us([lambda: read.launch(grid, 512, (x, count, sink), device=x.device)], 100) / 1e3


def median_us(calls: list[Call], budget_ms: float = 60.0, groups: int = 5) -> float:
    """Median microseconds of one call; all calls are captured in one graph, after two warm-up rounds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def replay(n: int) -> float:
        start.record()
        for _ in range(n):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / n

    replay(1)
    n = max(1, min(200, int(budget_ms * 1e3 / groups / max(replay(1), 1.0))))
    return statistics.median(replay(n) for _ in range(groups)) / len(calls)
