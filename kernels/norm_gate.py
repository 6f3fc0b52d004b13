"""Residual sum, RMSNorm and gate in one launch: from the output product to the experts that a token goes to.

Why: at few tokens each launch is all latency, and this is one less a layer. Results are those of `add_rms_norm` and
`gate_linear`, bit for bit."""

import functools

import numpy as np
import torch

from .checks import require, require_sizes
from .gate_linear import ctas_for
from .gate_linear import takes as takes_gate
from .jit import Kernel
from .thin_linear import MAX_K, warps_for

BF16 = torch.bfloat16
MAX_EXPERTS = 256  # what a lane of the choosing warp holds beside the row's weights
_ROOM_BETWEEN_ROWS = 64  # bytes, in norm_gate.cu


def norm_gate(
    y: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    gate: torch.Tensor,
    top_k: int,
    *,
    renormalize: bool = True,
    rows: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """residual [T, H] bf16 becomes bf16(residual + y) in place; returns its norm x times norm_weight [H], [T, H] bf16
    (in `out`, which is neither y nor residual), and topk_ids int32, topk_weights float32, [T, top_k], of x @ gate^T
    [E, H]. `rows` and `counts` as in `gate_linear`."""
    num_tokens, hidden = residual.shape
    num_experts = gate.shape[0]
    require_sizes(
        takes(num_experts, hidden, top_k, residual.device),
        f"norm_gate takes a GPU of capability 9.0, hidden of 512, 1024, 2048 or {MAX_K}, experts of a multiple of 8 "
        f"up to {MAX_EXPERTS} and top_k up to 32, got {hidden}, {num_experts} and {top_k}: use add_rms_norm and "
        "gate_linear",
    )
    require("residual", residual, BF16, (None, None))
    require("y", y, BF16, (num_tokens, hidden))
    require("norm_weight", norm_weight, BF16, (hidden,))
    require("gate", gate, BF16, (None, hidden))
    if rows is not None:
        require("rows", rows, torch.int64, (num_tokens,))
    if counts is not None:
        require("counts", counts, torch.int32, (num_experts,))
    x = torch.empty_like(residual) if out is None else require("out", out, BF16, (num_tokens, hidden))
    ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=y.device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=y.device)
    if num_tokens:
        num_rows, num_warps = 1 if num_tokens == 1 else 8, warps_for(hidden)
        norm_gate_kernel(hidden, num_experts, top_k, renormalize, num_rows).launch(
            (ctas_for(num_experts) * -(-num_tokens // 8),),
            32 * num_warps,
            (
                y,
                residual,
                norm_weight,
                np.float32(eps),
                x,
                np.int32(num_tokens),
                gate,
                rows,
                ids,
                weights,
                counts,
            ),
            device=y.device,
            shared_bytes=num_rows * (2 * hidden + _ROOM_BETWEEN_ROWS),
        )
    return x, ids, weights


def takes(num_experts: int, hidden: int, top_k: int, device: torch.device) -> bool:
    """Whether there is a kernel: a warp multiplies the 256 columns whose norm it makes."""
    fits = 512 <= hidden <= MAX_K and hidden == 256 * warps_for(hidden) and num_experts <= MAX_EXPERTS
    return fits and takes_gate(num_experts, hidden, top_k, device)


@functools.cache
def norm_gate_kernel(hidden: int, num_experts: int, top_k: int, renormalize: bool, num_rows: int) -> Kernel:
    defines = {
        "K": hidden,
        "WARPS": warps_for(hidden),
        "NUM_EXPERTS": num_experts,
        "CTAS": ctas_for(num_experts),
        "TOP_K": top_k,
        "RENORMALIZE": int(renormalize),
        "ROWS": num_rows,
    }
    return Kernel("norm_gate.cu", "norm_gate", defines)
