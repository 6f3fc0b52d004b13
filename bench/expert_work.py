"""What it costs that the experts' kernels note rows and busy time: the product of a layer with and without, and what is
noted beside what passed.

    python -P -m expertmesh.bench.expert_work [--tokens 1 8 32 128 512] [--json FILE]

Needs a GPU. Graphs of 40 products over three layers in turn, whose weights do not fit the L2; the two graphs run in
turn, medians of 15. Even routing."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from ..kernels.expert_layer import ExpertLayer, LayerForm
from ..kernels.expert_work import ExpertWork

CASES: dict[str, tuple[LayerForm, int, int, int]] = {  # experts, hidden, intermediate
    "30b bf16": ("bf16", 128, 2048, 768),
    "half of 235b fp8": ("fp8", 64, 4096, 1536),
    "30b w8a16": ("w8a16", 128, 2048, 768),
}
NUM_PRODUCTS, NUM_RUNS, TOP_K = 40, 15, 8


@dataclass(frozen=True, slots=True)
class Cost:
    case: str
    num_tokens: int
    plain_us: float  # a product
    noted_us: float
    busy_us: float  # as it was noted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(torch.cuda.get_device_name())
    found = []
    for cost in measure(arguments.tokens):
        print(
            f"{cost.case}, {cost.num_tokens} tokens: {cost.plain_us:.2f} us a product, noted {cost.noted_us:.2f} "
            f"({cost.noted_us - cost.plain_us:+.2f}), busy {cost.busy_us:.2f}",
            flush=True,
        )
        found.append(asdict(cost))
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "costs": found}))


def measure(tokens: Sequence[int]) -> Iterator[Cost]:
    device = torch.device("cuda", torch.cuda.current_device())
    for case, (form, num_experts, hidden, width) in CASES.items():
        layers = [_make_layer(form, num_experts, hidden, width, device) for _ in range(3)]
        for num_tokens in tokens:
            x = torch.randn(num_tokens, hidden, device=device).bfloat16()
            ids = torch.rand(num_tokens, num_experts, device=device).argsort(-1)[:, :TOP_K].to(torch.int32)
            work = ExpertWork(1, device)
            graphs = [_graph_of(layers, x, ids, noting) for noting in (None, work)]
            for graph in graphs:
                _time_us(graph)
            before = work.busy_s()
            plain, noted = zip(*[(_time_us(graphs[0]), _time_us(graphs[1])) for _ in range(NUM_RUNS)], strict=True)
            busy_us = 1e6 * (work.busy_s() - before) / (NUM_RUNS * NUM_PRODUCTS)
            yield Cost(case, num_tokens, median(plain), median(noted), busy_us)


def _make_layer(form: LayerForm, num_experts: int, hidden: int, width: int, device: torch.device) -> ExpertLayer:
    w13 = torch.randn(num_experts, 2 * width, hidden, dtype=torch.bfloat16, device=device) * 0.02
    w2 = torch.randn(num_experts, hidden, width, dtype=torch.bfloat16, device=device) * 0.02
    if form == "bf16":
        return ExpertLayer(w13, w2, kernels="cuda")
    scales = [torch.full((num_experts, *(n // 128 for n in w.shape[1:])), 0.01, device=device) for w in (w13, w2)]
    w13, w2 = w13.mul(100).to(torch.float8_e4m3fn), w2.mul(100).to(torch.float8_e4m3fn)
    return ExpertLayer(w13, w2, *scales, kernels="cuda", form=form)


def _graph_of(
    layers: Sequence[ExpertLayer], x: torch.Tensor, ids: torch.Tensor, work: ExpertWork | None
) -> torch.cuda.CUDAGraph:
    noting = None if work is None else work.of(0)

    def run() -> None:
        for i in range(NUM_PRODUCTS):
            layers[i % len(layers)].rows(x, ids, work=noting)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def _time_us(graph: torch.cuda.CUDAGraph) -> float:
    """A product."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / NUM_PRODUCTS


if __name__ == "__main__":
    main()
