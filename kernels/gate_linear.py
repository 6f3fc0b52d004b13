"""From a token's hidden state to its experts in one launch: the gate's product, softmax, top-k, renormalisation.

Why: at few tokens each of the two or three launches that this takes otherwise is all latency, once a layer. The gate's
logits are rounded to bf16 before the softmax, as in the plain model, and ties go to the lower expert. A token's result
depends on that token alone, whatever the batch."""

import functools

import numpy as np
import torch

from .checks import require, require_sizes
from .jit import Kernel
from .thin_linear import MAX_K, warps_for

BF16 = torch.bfloat16


def gate_linear(
    x: torch.Tensor,
    gate: torch.Tensor,
    top_k: int,
    *,
    renormalize: bool = True,
    rows: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, H] bf16, gate [E, H] bf16 -> topk_ids int32, topk_weights float32, [T, top_k], as gate_topk(x @ gate^T).

    Tokens whose `rows` [T] int64 are negative (a slot mapping's padding) are routed nowhere: ids -1. `counts` [E] int32
    is added to. A token with NaN or infinite logits is routed nowhere, with NaN weights."""
    num_tokens, hidden = x.shape
    num_experts = gate.shape[0]
    require_sizes(
        takes(num_experts, hidden, top_k, x.device),
        f"gate_linear takes a GPU of capability 9.0, hidden of a multiple of 32 up to {MAX_K}, experts of a multiple "
        f"of 8 up to 512 and top_k up to 32, got {hidden}, {num_experts} and {top_k}: use a product and gate_topk",
    )
    require("x", x, BF16, (None, None))
    require("gate", gate, BF16, (None, hidden))
    if rows is not None:
        require("rows", rows, torch.int64, (num_tokens,))
    if counts is not None:
        require("counts", counts, torch.int32, (num_experts,))
    ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=x.device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=x.device)
    if num_tokens:
        num_ctas = ctas_for(num_experts)
        gate_linear_kernel(hidden, num_experts, top_k, renormalize).launch(
            (num_ctas * -(-num_tokens // 8),),
            32 * warps_for(hidden),
            (x, np.int32(num_tokens), gate, rows, ids, weights, counts),
            device=x.device,
        )
    return ids, weights


def takes(num_experts: int, hidden: int, top_k: int, device: torch.device) -> bool:
    """Whether there is a kernel for a gate [num_experts, hidden] on this device."""
    fits = hidden % 32 == 0 and 64 <= hidden <= MAX_K and num_experts % 8 == 0 and 0 < num_experts <= 512
    return fits and 0 < top_k <= min(32, num_experts) and torch.cuda.get_device_capability(device)[0] >= 9


def ctas_for(num_experts: int) -> int:
    """CTAs of a cluster: as many as share the groups of 8 experts evenly."""
    return next(n for n in (8, 4, 2, 1) if num_experts % (8 * n) == 0)


@functools.cache
def gate_linear_kernel(hidden: int, num_experts: int, top_k: int, renormalize: bool) -> Kernel:
    defines = {
        "K": hidden,
        "WARPS": warps_for(hidden),
        "NUM_EXPERTS": num_experts,
        "CTAS": ctas_for(num_experts),
        "TOP_K": top_k,
        "RENORMALIZE": int(renormalize),
    }
    return Kernel("gate_linear.cu", "gate_linear", defines)
