"""What others' kernels take for the same layer, where they are installed: torch, vLLM's Triton and DeepGEMM paths,
FlashInfer, DeepGEMM alone.

A peer is either the *whole layer* (ids and rows in, combined rows out, like ours) or its *products* alone, with rows
already in order. vLLM is driven through the same calls as its own fused layer makes. FlashInfer counts as present
only with its compiled Hopper module, since building that takes half an hour."""

import importlib.util
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .bench_clock import DEVICE, FP8, Call
from .bench_inputs import TOP_K, Draw, Shape

_kept_open = ExitStack()  # vLLM reads its configuration from a context


@dataclass(frozen=True, slots=True)
class Case:
    """One layer's weights as the peers take them, and what they derive from those, kept for all its draws."""

    shape: Shape
    w13: torch.Tensor
    w2: torch.Tensor
    scales: tuple[torch.Tensor, ...]
    derived: dict[str, Any] = field(default_factory=dict)

    @property
    def expert_map(self) -> torch.Tensor | None:
        if self.shape.num_local == self.shape.num_experts:
            return None
        if "map" not in self.derived:
            made = torch.full((self.shape.num_experts,), -1, dtype=torch.int32, device=DEVICE)
            made[: self.shape.num_local] = torch.arange(self.shape.num_local, dtype=torch.int32, device=DEVICE)
            self.derived["map"] = made
        return self.derived["map"]


@dataclass(frozen=True, slots=True)
class Peer:
    """`make` gives the call for one draw, or None where the peer has no layout for that size."""

    name: str
    form: str
    whole_layer: bool
    make: Callable[[Case, Draw], Call | None]


def peers_present(form: str) -> list[Peer]:
    found = [Peer("torch", "bf16", False, _torch_bf16), Peer("torch_row_scaled", "fp8", False, _torch_fp8)]
    if _vllm_ready():
        found += [Peer("vllm_triton", f, True, _vllm_triton) for f in ("bf16", "fp8")]
        found.append(Peer("vllm_deepgemm", "fp8", True, lambda c, d: _vllm_modular(c, d, "deepgemm")))
        if _flashinfer_built():
            found += [
                Peer("flashinfer", f, True, lambda c, d: _vllm_modular(c, d, "flashinfer")) for f in ("bf16", "fp8")
            ]
        found += [
            Peer(name, f, False, make)
            for f in ("bf16", "fp8")
            for name, make in (("deepgemm_masked", _deepgemm_masked), ("deepgemm_contiguous", _deepgemm_contiguous))
        ]
    return [p for p in found if p.form == form]


@dataclass(frozen=True, slots=True)
class OrderedRows:
    """Local pairs in expert order, as the product-only peers want them."""

    rows: torch.Tensor  # [num_pairs, hidden]
    counts: torch.Tensor  # [num_local]
    ends: torch.Tensor  # [num_local] int32, inclusive prefix sum


def ordered(d: Draw, num_local: int) -> OrderedRows:
    flat = d.ids.flatten().long()
    mine = (flat >= 0).nonzero().flatten()
    order = mine[flat[mine].argsort(stable=True)]
    counts = torch.bincount(flat[order], minlength=num_local)
    return OrderedRows(d.x[order // TOP_K].contiguous(), counts, counts.cumsum(0).to(torch.int32))


# --------------------------------------------------------------------------------------------------------------- torch
def _torch_bf16(case: Case, d: Draw) -> Call:
    o = ordered(d, case.shape.num_local)
    h = torch.randn(o.rows.shape[0], case.shape.intermediate, dtype=torch.bfloat16, device=DEVICE)
    product = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
    a, b = case.w13.transpose(1, 2), case.w2.transpose(1, 2)
    return lambda: (product(o.rows, a, offs=o.ends), product(h, b, offs=o.ends))


def _torch_fp8(case: Case, d: Draw) -> Call:
    """One scale a row and a column, not 128x128 blocks: an easier format, rows quantised beforehand."""
    o, s = ordered(d, case.shape.num_local), case.shape
    num_pairs = o.rows.shape[0]
    x, h = o.rows.to(FP8), torch.randn(num_pairs, s.intermediate, device=DEVICE).to(FP8)
    ones = torch.ones(num_pairs, device=DEVICE)
    scales = [torch.ones(s.num_local, n, device=DEVICE) for n in (2 * s.intermediate, s.hidden)]
    a, b = case.w13.transpose(1, 2), case.w2.transpose(1, 2)

    def call() -> None:
        for rows, weight, scale in ((x, a, scales[0]), (h, b, scales[1])):
            torch._scaled_grouped_mm(
                rows, weight, ones, scale, offs=o.ends, out_dtype=torch.bfloat16, use_fast_accum=True
            )

    return call


# ---------------------------------------------------------------------------------------------------------------- vLLM
@cache
def _vllm_ready() -> bool:
    if importlib.util.find_spec("vllm") is None:
        return False
    try:
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.utils.deep_gemm import DeepGemmQuantScaleFMT
        from vllm.v1.worker.workspace import init_workspace_manager

        config = VllmConfig()
        if not config.compilation_config.max_cudagraph_capture_size:
            config.compilation_config.max_cudagraph_capture_size = 512  # what an engine of 256 sequences uses
        _kept_open.enter_context(set_current_vllm_config(config))
        init_workspace_manager(torch.device(DEVICE, 0))
        DeepGemmQuantScaleFMT.init_oracle_cache()
        import vllm._custom_ops  # noqa: F401
    except Exception as error:  # a broken peer must not end our own measurement
        print(f"vLLM is installed but does not start: {error!r}", file=sys.stderr)
        return False
    return True


@cache
def _flashinfer_built() -> bool:
    if importlib.util.find_spec("flashinfer") is None:
        return False
    from flashinfer.jit import env

    folders = (env.FLASHINFER_AOT_DIR, env.FLASHINFER_JIT_DIR)
    return any((Path(folder) / "fused_moe_90" / "fused_moe_90.so").exists() for folder in folders)


def _vllm_triton(case: Case, d: Draw) -> Call:
    from vllm.model_executor.layers.fused_moe import fused_experts

    expert_map, quant = case.expert_map, _quant_config(*case.scales)
    return lambda: fused_experts(
        d.x,
        case.w13,
        case.w2,
        d.weights,
        d.all_ids,
        global_num_experts=case.shape.num_experts,
        expert_map=expert_map,
        quant_config=quant,
    )


def _quant_config(*scales: torch.Tensor) -> Any:
    from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

    if not scales:
        return None
    return fp8_w8a8_moe_quant_config(w1_scale=scales[0], w2_scale=scales[1], block_shape=[128, 128])


def _vllm_modular(case: Case, d: Draw, backend: str) -> Call:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    if backend not in case.derived:
        case.derived[backend] = _modular_kernel(case, backend)
    kernel, w13, w2 = case.derived[backend]
    expert_map = None if backend == "flashinfer" else case.expert_map

    def call() -> Any:
        return kernel.apply(
            d.x,
            w13,
            w2,
            topk_ids=d.all_ids,
            topk_weights=d.weights,
            activation=MoEActivation.SILU,
            global_num_experts=case.shape.num_experts,
            expert_map=expert_map,
            apply_router_weight_on_input=False,
        )

    if backend == "flashinfer" and case.shape.form == "bf16":
        from flashinfer.autotuner import autotune

        with autotune(True):  # vLLM tunes up to its largest CUDA graph and keeps that choice beyond
            call()
    return call


def _modular_kernel(case: Case, backend: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The kernel as vLLM's own choice of back end builds it, with the weights in that back end's order."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FUSED_MOE_UNQUANTIZED_CONFIG,
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )
    from vllm.model_executor.layers.fused_moe.oracle import fp8, unquantized

    s = case.shape
    ep_size = s.num_experts // s.num_local
    parallel = FusedMoEParallelConfig(
        tp_size=1,
        tp_rank=0,
        pcp_size=1,
        pcp_rank=0,
        dp_size=1,
        dp_rank=0,
        ep_size=ep_size,
        ep_rank=0,
        sp_size=1,
        use_ep=ep_size > 1,
        all2all_backend="allgather_reducescatter",
        enable_eplb=False,
    )
    config = FusedMoEConfig(
        num_experts=s.num_experts,
        experts_per_token=TOP_K,
        hidden_dim=s.hidden,
        intermediate_size_per_partition=s.intermediate,
        num_local_experts=s.num_local,
        num_logical_experts=s.num_experts,
        activation=MoEActivation.SILU,
        device=DEVICE,
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
    )
    if s.form == "bf16":
        kind = unquantized.UnquantizedMoeBackend.FLASHINFER_CUTLASS
        kernel = unquantized.make_unquantized_moe_kernel(
            FUSED_MOE_UNQUANTIZED_CONFIG, config, kind, unquantized.backend_to_kernel_cls(kind)
        )
        return kernel, _up_first(case.w13), case.w2
    if backend == "deepgemm":
        from vllm.model_executor.layers.quantization.utils.fp8_utils import prepare_fp8_moe_layer_for_deepgemm

        kind = fp8.Fp8MoeBackend.DEEPGEMM
        clones = (t.clone() for t in (case.w13, case.w2, *case.scales))  # it changes them in place
        w13, w2, *scales = prepare_fp8_moe_layer_for_deepgemm(*clones, (128, 128))
    else:
        kind = fp8.Fp8MoeBackend.FLASHINFER_CUTLASS
        w13, w2 = _up_first(case.w13.view(torch.uint8)).view(FP8), case.w2
        scales = [_up_first(case.scales[0]), case.scales[1]]
    return fp8.make_fp8_moe_kernel(_quant_config(*scales), config, fp8.backend_to_kernel_cls(kind)[0], kind), w13, w2


def _up_first(w13: torch.Tensor) -> torch.Tensor:
    gate, up = w13.chunk(2, dim=1)
    return torch.cat([up, gate], 1)


# ------------------------------------------------------------------------------------------------------ DeepGEMM alone
def _deepgemm_masked(case: Case, d: Draw) -> Call | None:
    """One padded slab of rows per expert, for decode sizes."""
    import vllm.third_party.deep_gemm as deep_gemm

    s = case.shape
    if d.x.shape[0] > 512:
        return None
    counts = torch.bincount(d.ids[d.ids >= 0].long(), minlength=s.num_local).to(torch.int32)
    slab, expected = (int(counts.max()) + 127) // 128 * 128, max(1, round(d.num_pairs / s.num_local))
    x = torch.randn(s.num_local, slab, s.hidden, device=DEVICE, dtype=torch.bfloat16)
    h = torch.randn(s.num_local, slab, s.intermediate, device=DEVICE, dtype=torch.bfloat16)
    out1 = torch.empty(s.num_local, slab, 2 * s.intermediate, device=DEVICE, dtype=torch.bfloat16)
    out2 = torch.empty_like(x)
    if s.form == "bf16":
        product = deep_gemm.m_grouped_bf16_gemm_nt_masked
        return lambda: (product(x, case.w13, out1, counts, expected), product(h, case.w2, out2, counts, expected))
    product = deep_gemm.m_grouped_fp8_gemm_nt_masked
    qx, qh = _with_unit_scales(x), _with_unit_scales(h)
    w13, w2 = (case.w13, case.scales[0]), (case.w2, case.scales[1])
    return lambda: (product(qx, w13, out1, counts, expected), product(qh, w2, out2, counts, expected))


def _deepgemm_contiguous(case: Case, d: Draw) -> Call | None:
    """Rows in expert order, each expert's padded to 128."""
    import vllm.third_party.deep_gemm as deep_gemm

    s = case.shape
    if d.x.shape[0] < 128:
        return None
    counts = torch.bincount(d.ids[d.ids >= 0].long(), minlength=s.num_local)
    padded = (counts + 127) // 128 * 128
    experts = torch.arange(s.num_local, device=DEVICE, dtype=torch.int32).repeat_interleave(padded)
    x = torch.randn(experts.numel(), s.hidden, device=DEVICE, dtype=torch.bfloat16)
    h = torch.randn(experts.numel(), s.intermediate, device=DEVICE, dtype=torch.bfloat16)
    out1 = torch.empty(experts.numel(), 2 * s.intermediate, device=DEVICE, dtype=torch.bfloat16)
    out2 = torch.empty_like(x)
    if s.form == "bf16":
        product = deep_gemm.m_grouped_bf16_gemm_nt_contiguous
        return lambda: (product(x, case.w13, out1, experts), product(h, case.w2, out2, experts))
    product = deep_gemm.m_grouped_fp8_gemm_nt_contiguous
    qx, qh = _with_unit_scales(x), _with_unit_scales(h)
    w13, w2 = (case.w13, case.scales[0]), (case.w2, case.scales[1])
    return lambda: (product(qx, w13, out1, experts), product(qh, w2, out2, experts))


def _with_unit_scales(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import vllm.third_party.deep_gemm as deep_gemm

    scales = torch.ones(*rows.shape[:-1], rows.shape[-1] // 128, device=DEVICE)
    return rows.to(FP8), deep_gemm.get_mn_major_tma_aligned_tensor(scales)
