"""The expert layer as the expert tier calls it: rows and local expert ids in, one row per (row, k) or combined rows
out.

On Hopper the kernels run (route -> pack_rows -> grouped_gemm -> combine, four launches, no host sync, capturable
after one warm-up call of the same sizes); anywhere else plain torch does, said once. `experts/mlp.py` calls this and
nothing below it."""

import logging

import torch

from ..errors import KernelError
from . import reference
from .combine import combine
from .grouped_gemm import grouped_gemm
from .pack import PackedWeights, pack_experts, unsupported_shape
from .permute import pack_rows, route
from .plan import GemmPlan, choose_plan

logger = logging.getLogger(__name__)


class ExpertLayer:
    """Local experts of one layer. Takes weights in the checkpoint's layout and keeps only the form that its path
    reads."""

    def __init__(
        self,
        w13: torch.Tensor,  # [num_local_experts, 2 * intermediate, hidden] bf16, or e4m3 with scales
        w2: torch.Tensor,  # [num_local_experts, hidden, intermediate]
        w13_scales: torch.Tensor | None = None,  # [num_local_experts, 2 * intermediate / 128, hidden / 128] float32
        w2_scales: torch.Tensor | None = None,
        *,
        kernels: str = "auto",  # "auto", "cuda" (an error where there is none) or "torch"
    ) -> None:
        self.num_local_experts, self.hidden_size, self.intermediate_size = w2.shape
        reason = "asked for" if kernels == "torch" else why_no_kernels(w13, w2)
        if reason and kernels == "cuda":
            raise KernelError(f"no expert kernels: {reason}; use kernels='torch'")
        self.packed: PackedWeights | None = None
        if reason:
            if kernels != "torch":
                _say_once(reason)
            self.natural = (w13, w2, w13_scales, w2_scales)
        else:
            self.packed = pack_experts(w13, w2, w13_scales, w2_scales)

    def rows(
        self,
        rows: torch.Tensor,  # [num_rows, hidden] bf16
        ids: torch.Tensor,  # [num_rows, top_k] int32: local expert, -1 none; physical when expert_map is given
        *,
        expert_map: torch.Tensor | None = None,
        expected_pairs: float | None = None,
        plan: GemmPlan | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One unweighted output row per (row, k), [num_rows, top_k, hidden]. Rows whose id is not local hold nothing of
        meaning. `expected_pairs` (default: all) only helps to choose a plan."""
        if self.packed is None:
            return self._torch_rows(rows, ids, expert_map)
        out = (
            torch.empty(*ids.shape, self.hidden_size, dtype=torch.bfloat16, device=rows.device) if out is None else out
        )
        if not ids.numel():
            return out
        self._check_rows(rows, ids)
        if plan is None:
            plan = choose_plan(self.packed.form, expected_pairs or ids.numel(), self.num_local_experts)
        places = route(ids, self.num_local_experts, plan.tile, expert_map)
        packed, scales = pack_rows(rows, places, fp8=self.packed.form == "fp8")
        grouped_gemm(packed, scales, self.packed, places, plan, out)
        return out

    def combined(
        self,
        rows: torch.Tensor,
        ids: torch.Tensor,
        topk_weights: torch.Tensor,  # [num_rows, top_k] float32
        *,
        expert_map: torch.Tensor | None = None,
        expected_pairs: float | None = None,
        plan: GemmPlan | None = None,
    ) -> torch.Tensor:
        """Each row's outputs weighted and summed in k order in float32, [num_rows, hidden]; zero where nothing is
        local."""
        y = self.rows(rows, ids, expert_map=expert_map, expected_pairs=expected_pairs, plan=plan)
        if self.packed is None:
            return reference.combine(y, reference.local_ids(ids, self.num_local_experts, expert_map), topk_weights).to(
                rows.dtype
            )
        return combine(y, ids, topk_weights, num_local_experts=self.num_local_experts, expert_map=expert_map)

    def _torch_rows(self, rows: torch.Tensor, ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
        w13, w2, w13_scales, w2_scales = self.natural
        ids = reference.local_ids(ids, self.num_local_experts, expert_map)
        if w13_scales is None or w2_scales is None:
            return reference.expert_rows(rows, ids, w13, w2)
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


def why_no_kernels(w13: torch.Tensor, w2: torch.Tensor) -> str | None:
    """Why these weights cannot use the kernels, or None."""
    if not w13.is_cuda:
        return f"weights are on {w13.device}"
    capability = torch.cuda.get_device_capability(w13.device)
    if capability != (9, 0):
        name, found = torch.cuda.get_device_name(w13.device), ".".join(map(str, capability))
        return f"{name} has compute capability {found}, the kernels need 9.0"
    if w13.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        return f"weights are {w13.dtype}, the kernels take bfloat16 or float8_e4m3fn"
    return unsupported_shape(
        w2.shape[1], w2.shape[2], w2.shape[0], "fp8" if w13.dtype == torch.float8_e4m3fn else "bf16"
    )


_said: set[str] = set()


def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        logger.warning("expert layer runs in plain torch, much slower than the kernels: %s", reason)
