"""The expert layer as the expert tier calls it: rows and local expert ids in, one row per (row, k) or combined rows
out.

Weights are bf16, e4m3 with 128x128 block scales, or int4 in groups of 128. Three paths, each without a host sync and
capturable after one warm-up call of the same sizes:
- Hopper, bf16 and fp8 (W8A8): route -> pack_rows (few pairs: both in one launch) -> grouped_gemm (wgmma) -> combine.
- Hopper with int4 or W8A16, and every form on other GPUs of compute capability 8.0 and later:
  route -> grouped_gemm_mma (mma.sync, activations stay bf16) -> combine. fp8 weights are then W8A16: nearer to the
  weights than W8A8, and not the same bits.
- Anything else: plain torch, said once. `experts/mlp.py` calls this and nothing below it."""

import logging
from time import perf_counter_ns
from typing import Literal

import torch

from ..errors import KernelError
from ..quantized import Int4Matrix
from . import reference
from .combine import combine
from .expert_work import LayerWork, note_in_torch
from .grouped_gemm import grouped_gemm
from .grouped_gemm_mma import MmaPlan, choose_mma_plan, grouped_gemm_mma
from .pack import PackedWeights, pack_experts, unsupported_shape
from .pack_int4 import expert_rows_int4
from .pack_mma import PackedMma, pack_mma, unsupported_mma_shape
from .permute import pack_rows, route, route_and_pack, takes_one_launch
from .plan import GemmPlan, choose_plan

logger = logging.getLogger(__name__)

LayerForm = Literal["bf16", "fp8", "w8a16", "int4"]
Plan = GemmPlan | MmaPlan


class ExpertLayer:
    """Local experts of one layer. Takes weights in the checkpoint's layout and keeps only the form that its path
    reads."""

    def __init__(
        self,
        w13: torch.Tensor | Int4Matrix,  # [num_local_experts, 2 * intermediate, hidden] bf16, e4m3 with scales, or int4
        w2: torch.Tensor | Int4Matrix,  # [num_local_experts, hidden, intermediate]
        w13_scales: torch.Tensor | None = None,  # [num_local_experts, 2 * intermediate / 128, hidden / 128] float32
        w2_scales: torch.Tensor | None = None,
        *,
        kernels: str = "auto",  # "auto", "cuda" (an error where there is none) or "torch"
        form: LayerForm | None = None,  # of the products; default: bf16, fp8 (W8A8) or int4, as the weights are
    ) -> None:
        self.num_local_experts, self.hidden_size, self.intermediate_size = w2.shape
        self.form = layer_form(w13, w2, form)
        reason = "asked for" if kernels == "torch" else why_no_kernels(w13, w2, self.form)
        if reason and kernels == "cuda":
            raise KernelError(f"no expert kernels: {reason}; use kernels='torch'")
        self.packed: PackedWeights | PackedMma | None = None
        if reason:
            if kernels != "torch":
                _say_once(f"expert layer runs in plain torch, much slower than the kernels: {reason}")
            self.natural = _tensors_of(w13, w2, w13_scales, w2_scales)
            return
        self.capability = torch.cuda.get_device_capability(w13.device)
        if _has_wgmma_path(self.capability, self.form):
            self.packed = pack_experts(w13, w2, w13_scales, w2_scales)  # type: ignore[arg-type]
        else:
            if self.form == "fp8":
                _say_once(
                    "expert layer: fp8 weights are multiplied by bf16 rows (W8A16) on compute capability "
                    f"{self.capability[0]}.{self.capability[1]}; W8A8 needs 9.0"
                )
            self.packed = pack_mma(w13, w2, w13_scales, w2_scales)

    def rows(
        self,
        rows: torch.Tensor,  # [num_rows, hidden] bf16
        ids: torch.Tensor,  # [num_rows, top_k] int32: local expert, -1 none; physical when expert_map is given
        *,
        expert_map: torch.Tensor | None = None,
        expected_pairs: float | None = None,
        plan: Plan | None = None,
        out: torch.Tensor | None = None,
        work: LayerWork | None = None,
    ) -> torch.Tensor:
        """One unweighted output row per (row, k), [num_rows, top_k, hidden]. Rows whose id is not local hold nothing of
        meaning. `expected_pairs` (default: all) only helps to choose a plan. What was done is noted in `work`."""
        if self.packed is None:
            started, local = perf_counter_ns(), reference.local_ids(ids, self.num_local_experts, expert_map)
            made = self._torch_rows(rows, local)
            if work is not None:
                note_in_torch(work, local, perf_counter_ns() - started)
            return made
        out = (
            torch.empty(*ids.shape, self.hidden_size, dtype=torch.bfloat16, device=rows.device) if out is None else out
        )
        if not ids.numel():
            return out
        self._check_rows(rows, ids)
        expected = expected_pairs or ids.numel()
        if isinstance(self.packed, PackedMma):
            if plan is None:
                plan = choose_mma_plan(
                    self.packed.form,
                    expected,
                    self.num_local_experts,
                    self.hidden_size,
                    self.intermediate_size,
                    has_zeros=self.packed.has_zeros,
                    capability=self.capability,
                )
            assert isinstance(plan, MmaPlan)
            places = route(ids, self.num_local_experts, plan.tile, expert_map, work=work)
            grouped_gemm_mma(rows, self.packed, places, plan, out, work and work.clock)
            return out
        if plan is None:
            plan = choose_plan(
                self.packed.form, expected, self.num_local_experts, self.hidden_size, self.intermediate_size
            )
        assert isinstance(plan, GemmPlan)
        fp8 = self.packed.form == "fp8"
        scales: torch.Tensor | None
        if takes_one_launch(ids.numel(), expected, self.num_local_experts):
            places, packed, scales = route_and_pack(
                rows, ids, self.num_local_experts, plan.tile, expert_map, granule=plan.granule, fp8=fp8, work=work
            )
        else:
            places = route(ids, self.num_local_experts, plan.tile, expert_map, granule=plan.granule, work=work)
            packed, scales = pack_rows(rows, places, fp8=fp8)
        grouped_gemm(packed, scales, self.packed, places, plan, out, work and work.clock)
        return out

    def combined(
        self,
        rows: torch.Tensor,
        ids: torch.Tensor,
        topk_weights: torch.Tensor,  # [num_rows, top_k] float32
        *,
        expert_map: torch.Tensor | None = None,
        expected_pairs: float | None = None,
        plan: Plan | None = None,
    ) -> torch.Tensor:
        """Each row's outputs weighted and summed in k order in float32, [num_rows, hidden]; zero where nothing is
        local."""
        y = self.rows(rows, ids, expert_map=expert_map, expected_pairs=expected_pairs, plan=plan)
        if self.packed is None:
            return reference.combine(y, reference.local_ids(ids, self.num_local_experts, expert_map), topk_weights).to(
                rows.dtype
            )
        return combine(y, ids, topk_weights, num_local_experts=self.num_local_experts, expert_map=expert_map)

    def _torch_rows(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        w13, w2, w13_scales, w2_scales, w13_zeros, w2_zeros = self.natural
        assert w13 is not None
        assert w2 is not None
        if w13_scales is None or w2_scales is None:
            return reference.expert_rows(rows, ids, w13, w2)
        if self.form == "int4":
            w13_int4, w2_int4 = Int4Matrix(w13, w13_scales, w13_zeros), Int4Matrix(w2, w2_scales, w2_zeros)
            return expert_rows_int4(rows, ids, w13_int4, w2_int4).to(rows.dtype)
        if self.form == "w8a16":
            w13, w2 = reference.dequantize_blocks(w13, w13_scales), reference.dequantize_blocks(w2, w2_scales)
            return reference.expert_rows(rows, ids, w13, w2, dtype=torch.float32).to(rows.dtype)
        return reference.expert_rows_fp8(rows, ids, w13, w2, w13_scales, w2_scales).to(rows.dtype)

    def _check_rows(self, rows: torch.Tensor, ids: torch.Tensor) -> None:
        expected = (ids.shape[0], self.hidden_size)
        if (
            rows.dtype != torch.bfloat16
            or tuple(rows.shape) != expected
            or not rows.is_contiguous()
            or not rows.is_cuda
        ):
            raise KernelError(
                f"rows must be contiguous bfloat16 {expected} on the GPU, "
                f"got {rows.dtype} {tuple(rows.shape)} on {rows.device}"
            )


def _tensors_of(
    w13: torch.Tensor | Int4Matrix,
    w2: torch.Tensor | Int4Matrix,
    w13_scales: torch.Tensor | None,
    w2_scales: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    """w13, w2, their scales, their zero points: what the torch path keeps, every tensor's first axis the expert."""
    if isinstance(w13, Int4Matrix) and isinstance(w2, Int4Matrix):
        return w13.nibbles, w2.nibbles, w13.scales, w2.scales, w13.zeros, w2.zeros
    assert isinstance(w13, torch.Tensor)
    assert isinstance(w2, torch.Tensor)
    return w13, w2, w13_scales, w2_scales, None, None


def layer_form(w13: torch.Tensor | Int4Matrix, w2: torch.Tensor | Int4Matrix, form: LayerForm | None) -> LayerForm:
    """The form that is computed. Raises KernelError where the weights cannot have the one asked for."""
    if isinstance(w13, Int4Matrix) != isinstance(w2, Int4Matrix):
        raise KernelError("w13 and w2 must both be int4 matrices, or both tensors")
    if isinstance(w13, Int4Matrix):
        possible: tuple[LayerForm, ...] = ("int4",)
    else:
        possible = ("fp8", "w8a16") if w13.dtype == torch.float8_e4m3fn else ("bf16",)
    if form is not None and form not in possible:
        raise KernelError(f"these weights can be multiplied as {' or '.join(possible)}, not as {form}")
    return form or possible[0]


def why_no_kernels(
    w13: torch.Tensor | Int4Matrix, w2: torch.Tensor | Int4Matrix, form: LayerForm | None = None
) -> str | None:
    """Why these weights cannot use the kernels, or None."""
    if w13.device.type != "cuda":
        return f"weights are on {w13.device}"
    capability = torch.cuda.get_device_capability(w13.device)
    if capability < (8, 0):
        name, found = torch.cuda.get_device_name(w13.device), ".".join(map(str, capability))
        return f"{name} has compute capability {found}, the kernels need 8.0"
    if isinstance(w13, torch.Tensor) and w13.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        return f"weights are {w13.dtype}, the kernels take bfloat16, float8_e4m3fn or int4"
    form = layer_form(w13, w2, form)
    num_local_experts, hidden, intermediate = w2.shape
    if _has_wgmma_path(capability, form):
        return unsupported_shape(hidden, intermediate, num_local_experts, "fp8" if form == "fp8" else "bf16")
    mma_form = "w8a16" if form == "fp8" else form
    return unsupported_mma_shape(hidden, intermediate, num_local_experts, mma_form)


def _has_wgmma_path(capability: tuple[int, int], form: LayerForm) -> bool:
    return capability == (9, 0) and form in ("bf16", "fp8")


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        logger.warning("%s", text)
