"""Softmax over all experts, top-k, renormalise, in one pass over the logits; optionally counts per expert."""

import functools

import numpy as np
import torch

from ..errors import KernelError
from .jit import Kernel


def gate_topk(
    logits: torch.Tensor,
    top_k: int,
    *,
    renormalize: bool = True,
    counts: torch.Tensor | None = None,
    num_valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`logits` [num_tokens, num_experts] float32 or bf16 -> topk_ids int32, topk_weights float32, [num_tokens, top_k].
    `counts` [num_experts] int32 is added to. A row of NaN is routed nowhere (-1, NaN weights), nor are rows from
    `num_valid` [1] int32 on, a number on the device: the padding of a captured step."""
    num_tokens, num_experts = logits.shape
    if logits.dtype not in (torch.float32, torch.bfloat16) or not logits.is_contiguous():
        raise KernelError(
            f"gate logits must be contiguous float32 or bfloat16, got {logits.dtype}, strides {logits.stride()}"
        )
    if not 0 < top_k <= min(32, num_experts) or num_experts > 1024:
        raise KernelError(f"gate_topk takes up to 1024 experts and top_k up to 32, got {num_experts} and {top_k}")
    ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    if num_tokens:
        gate_kernel(num_experts, top_k, renormalize, logits.dtype == torch.bfloat16).launch(
            (-(-num_tokens // 4),),
            128,
            (logits, np.int32(num_tokens), num_valid, ids, weights, counts),
            device=logits.device,
        )
    return ids, weights


@functools.cache
def gate_kernel(num_experts: int, top_k: int, renormalize: bool, bf16: bool) -> Kernel:
    defines = {"NUM_EXPERTS": num_experts, "TOP_K": top_k, "RENORMALIZE": int(renormalize), "LOGITS_BF16": int(bf16)}
    return Kernel("gate_topk.cu", "gate_topk", defines)
