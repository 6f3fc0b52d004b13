"""Compile every plan of an expert product, and what routes few pairs for it, before a step needs it.

Which plan a step takes follows from how many pairs it has (`plan.py`), so some are met late: in a load of growing
batches the plan for 640 to 1152 tokens of Qwen3-30B was compiled in the middle of all streams, which then waited for
1.1 s (one H100). NVRTC works without the GPU and lets other threads run, so all plans are compiled at once beside
whatever the process does; a later launch finds them in memory, or a later process on disk."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from .expert_layer import ExpertLayer
from .grouped_gemm import gemm_kernel
from .grouped_gemm_mma import choose_mma_plan, mma_kernel
from .jit import Kernel, compile_only
from .pack import WeightForm
from .pack_mma import MmaForm, PackedMma
from .permute import one_launch_kernels
from .plan import all_plans

MOST_THREADS = 8


def kernels_of(layer: ExpertLayer, top_k: int) -> list[Kernel]:
    """Every grouped product that this layer may launch, and what is made for its plans before it; none where it runs
    in plain torch."""
    packed = layer.packed
    if packed is None:
        return []
    if isinstance(packed, PackedMma):
        return mma_kernels(
            packed.form,
            packed.num_local_experts,
            packed.hidden_size,
            packed.intermediate_size,
            top_k=top_k,
            has_zeros=packed.has_zeros,
            scales_bf16=packed.scales_bf16,
            capability=layer.capability,
        )
    return wgmma_kernels(packed.form, packed.num_local_experts, packed.hidden_size, packed.intermediate_size, top_k)


def wgmma_kernels(
    form: WeightForm, num_local_experts: int, hidden_size: int, intermediate_size: int, top_k: int
) -> list[Kernel]:
    """Of Hopper's path: products by every plan that fits these sizes, and the one launch before them."""
    plans = [plan for plan in all_plans(form) if plan.fits(hidden_size, intermediate_size)]
    before = one_launch_kernels(num_local_experts, hidden_size, top_k, form == "fp8", {plan.tile for plan in plans})
    return [*(gemm_kernel(plan, hidden_size, intermediate_size) for plan in plans), *before]


def mma_kernels(
    form: MmaForm,
    num_local_experts: int,
    hidden_size: int,
    intermediate_size: int,
    *,
    top_k: int,
    has_zeros: bool,
    scales_bf16: bool,
    capability: tuple[int, int],
    most_pairs: int = 1 << 20,
) -> list[Kernel]:
    """Of the other path: the plans that any number of pairs may choose."""
    found: list[Kernel] = []
    pairs = 1
    while pairs <= most_pairs:
        plan = choose_mma_plan(
            form,
            pairs,
            num_local_experts,
            hidden_size,
            intermediate_size,
            has_zeros=has_zeros,
            capability=capability,
        )
        kernel = mma_kernel(plan, hidden_size, intermediate_size, top_k, scales_bf16)
        found += [kernel] if kernel not in found else []
        pairs = pairs + max(1, pairs // 8)
    return found


def compile_ahead(kernels: Sequence[Kernel], arch: str) -> None:
    """In threads; returns when all are compiled. Raises KernelError with the log of one that does not compile."""
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="compile ahead") as pool:
        list(pool.map(lambda kernel: compile_only(kernel.file, arch, kernel.defines), kernels))
