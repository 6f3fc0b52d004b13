"""Each operation of the expert layer alone, beside the same in plain torch where torch has it.

Inputs are made beforehand and every call of the graph has its own. The products use up their route's claims, so a
copy of the route is laid back before each call and that copy's own time is taken off."""

from collections.abc import Callable

import torch

from .bench_clock import DEVICE, Call, median_us
from .bench_inputs import TOP_K, Draw, Shape
from .combine import combine
from .expert_layer import ExpertLayer
from .gate_topk import gate_topk
from .grouped_gemm import grouped_gemm
from .grouped_gemm_mma import MmaPlan, choose_mma_plan, grouped_gemm_mma
from .pack import PackedWeights
from .permute import RoutePlan, pack_rows, route, route_and_pack, takes_one_launch
from .plan import GemmPlan, choose_plan


def plan_for(layer: ExpertLayer, expected_pairs: float) -> GemmPlan | MmaPlan:
    """What the layer itself takes for so many pairs."""
    packed = layer.packed
    assert packed is not None
    if isinstance(packed, PackedWeights):
        return choose_plan(
            packed.form, expected_pairs, layer.num_local_experts, packed.hidden_size, packed.intermediate_size
        )
    return choose_mma_plan(
        packed.form,
        expected_pairs,
        layer.num_local_experts,
        packed.hidden_size,
        packed.intermediate_size,
        has_zeros=packed.has_zeros,
        capability=layer.capability,
    )


def operation_times(
    shape: Shape, layer: ExpertLayer, draws: list[Draw], expected_pairs: float
) -> dict[str, tuple[float, float | None]]:
    """name -> (microseconds here, microseconds in torch or None)."""
    plan = plan_for(layer, expected_pairs)
    num_tokens = draws[0].x.shape[0]
    logits = [torch.randn(num_tokens, shape.num_experts, device=DEVICE) for _ in draws]
    y = torch.randn(num_tokens, TOP_K, shape.hidden, device=DEVICE, dtype=torch.bfloat16)
    times: dict[str, tuple[float, float | None]] = {
        "gate_topk": (_us(gate_topk, logits, TOP_K), _us(_torch_gate, logits)),
        "route": (
            _brief_us([_bind(_route, d, layer, plan) for d in draws]),
            _brief_us([_bind(_torch_route, d.ids, layer.num_local_experts) for d in draws]),
        ),
    }
    if isinstance(layer.packed, PackedWeights):
        places = [_route(d, layer, plan) for d in draws]
        gathered = [p.pair_of_row[: int(p.state[1])].clamp_min(0) // TOP_K for p in places]
        torch_us = _brief_us([_bind(d.x.index_select, 0, i) for d, i in zip(draws, gathered)])
        times["pack_rows"] = (_pack_us(draws, places, False), torch_us)
        if layer.packed.form == "fp8":
            times["pack_rows, quantised"] = (_pack_us(draws, places, True), None)
        if takes_one_launch(draws[0].ids.numel(), expected_pairs, layer.num_local_experts):
            fp8 = layer.packed.form == "fp8"
            times["route_and_pack"] = (_brief_us([_bind(_one_launch, d, layer, plan, fp8) for d in draws]), None)
    times["grouped_gemm"] = (gemm_us(layer, draws, plan), None)
    times["combine"] = (
        _brief_us([_bind(combine, y, d.ids, d.weights) for d in draws]),
        _brief_us([_bind(_torch_combine, y, d.weights) for d in draws]),
    )
    return times


def gemm_us(layer: ExpertLayer, draws: list[Draw], plan: GemmPlan | MmaPlan) -> float:
    """Both products and SwiGLU alone: one launch."""
    packed = layer.packed
    assert packed is not None
    calls, resets = [], []
    for d in draws:
        places = _route(d, layer, plan)
        out = torch.empty(*d.ids.shape, layer.hidden_size, dtype=torch.bfloat16, device=DEVICE)
        if isinstance(packed, PackedWeights):
            rows, scales = pack_rows(d.x, places, fp8=packed.form == "fp8")
            products = _bind(grouped_gemm, rows, scales, packed, places, plan, out)
        else:
            products = _bind(grouped_gemm_mma, d.x, packed, places, plan, out)
        buffers = (places.ready, places.state)
        reset = _bind(_lay_back, buffers, [b.clone() for b in buffers])
        resets.append(reset)
        calls.append(_then(reset, products))
    return median_us(calls) - median_us(resets)


def stage_times(layer: ExpertLayer, draws: list[Draw], expected: float, plan: GemmPlan | None) -> dict[str, float]:
    """Microseconds of route, route + gather, and route + gather + products, as they overlap in the layer."""
    packed = layer.packed
    assert isinstance(packed, PackedWeights), "stages are those of the wgmma path"
    plan = plan or plan_for(layer, expected)
    assert isinstance(plan, GemmPlan)

    def run(d: Draw, upto: int) -> None:
        places = _route(d, layer, plan)
        if upto > 0:
            rows, scales = pack_rows(d.x, places, fp8=packed.form == "fp8")
        if upto > 1:
            out = torch.empty(*d.ids.shape, layer.hidden_size, dtype=torch.bfloat16, device=DEVICE)
            grouped_gemm(rows, scales, packed, places, plan, out)

    names = ("route", "+gather", "+gemms")
    return {name: round(median_us([_bind(run, d, i) for d in draws]), 1) for i, name in enumerate(names)}


def _route(d: Draw, layer: ExpertLayer, plan: GemmPlan | MmaPlan) -> RoutePlan:
    granule = plan.granule if isinstance(plan, GemmPlan) else 8
    return route(d.ids, layer.num_local_experts, plan.tile, granule=granule)


def _one_launch(d: Draw, layer: ExpertLayer, plan: GemmPlan | MmaPlan, fp8: bool) -> object:
    granule = plan.granule if isinstance(plan, GemmPlan) else 8
    return route_and_pack(d.x, d.ids, layer.num_local_experts, plan.tile, granule=granule, fp8=fp8)


def _pack_us(draws: list[Draw], places: list[RoutePlan], fp8: bool) -> float:
    return _brief_us([_bind(_pack, d.x, p, fp8) for d, p in zip(draws, places)])


def _pack(x: torch.Tensor, places: RoutePlan, fp8: bool) -> object:
    return pack_rows(x, places, fp8=fp8)


def _lay_back(buffers: tuple[torch.Tensor, ...], saved: list[torch.Tensor]) -> None:
    for buffer, values in zip(buffers, saved):
        torch.add(values, 0, out=buffer)  # a kernel: a copy would become a slower memcpy node


def _torch_gate(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = torch.softmax(logits, -1).topk(TOP_K)
    return ids.to(torch.int32), weights / weights.sum(-1, keepdim=True)


def _torch_route(ids: torch.Tensor, num_local: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and counts alone, without padding and tiles."""
    flat = ids.flatten()
    counts = torch.zeros(num_local + 1, dtype=torch.int32, device=ids.device)
    counts.index_add_(0, flat + 1, torch.ones_like(flat))
    return flat.argsort(stable=True), counts


def _torch_combine(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (y * weights[:, :, None]).sum(1).to(y.dtype)


def _us(operation: Callable[..., object], inputs: list[torch.Tensor], *rest: object) -> float:
    return _brief_us([_bind(operation, one, *rest) for one in inputs])


def _brief_us(calls: list[Call]) -> float:
    return median_us(calls, budget_ms=20)


def _bind(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: function(*arguments)


def _then(first: Callable[[], object], second: Callable[[], object]) -> Callable[[], object]:
    return lambda: (first(), second())
