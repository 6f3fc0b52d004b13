"""Paged attention of the GPU engine without compiled kernels: `attention.py` behind the interface of `flash.py`, and
the choice between the two.

Pages are gathered into padded tensors and go through torch's scaled_dot_product_attention, so a step's shapes depend on
its lengths: it cannot be captured in a CUDA graph, and it moves about three times the bytes. It is there for head sizes
and GPUs that the kernels do not do, and for hosts where nobody compiled them; which of the two a process runs is said
once, at its start."""

import logging
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...errors import KernelError
from ...numerics import Numerics
from .attention import AttentionPlan, PagedAttention
from .batch import StepBatch
from .flash import FlashAttention

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Heads:
    num_heads: int
    num_kv_heads: int
    head_dim: int


class TorchAttention:
    """`FlashAttention` in torch. Engine thread only."""

    capturable = False
    whole = None

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        device: torch.device | str,
        **_sizes: Any,
    ) -> None:
        self.device = torch.device(device)
        self._paged = PagedAttention(_Heads(num_heads, num_kv_heads, head_dim), Numerics(), block_size=block_size)
        self._plan: AttentionPlan | None = None

    def plan(
        self, q_lens: np.ndarray, seq_lens: np.ndarray, block_table: np.ndarray, *, bucket: int | None = None
    ) -> Hashable:
        assert bucket is None, "capturable is False"
        num_tokens = int(q_lens.sum())
        nothing = torch.empty(num_tokens, dtype=torch.int64, device=self.device)
        starts = np.zeros(len(q_lens) + 1, np.int32)
        np.cumsum(q_lens, out=starts[1:])
        batch = StepBatch(
            token_ids=nothing,
            positions=nothing,
            slot_mapping=torch.zeros(1, dtype=torch.int64),  # K and V are written elsewhere
            q_lens=torch.from_numpy(q_lens),
            seq_lens=torch.from_numpy(seq_lens),
            cu_seqlens_q=torch.from_numpy(starts),
            block_table=torch.from_numpy(np.ascontiguousarray(block_table)),
            logits_rows=nothing,
        )
        self._plan = self._paged.plan(batch)
        return None

    def attend(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert self._plan is not None, "attend before plan"
        mixed = self._paged.attend(self._plan, q, k_cache, v_cache)
        return mixed if out is None else out.copy_(mixed)


def select_attention(
    choice: str,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    device: torch.device | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype = torch.bfloat16,
    max_num_reqs: int = 256,
    max_num_blocks: int = 8192,
    invariant: bool = False,
) -> FlashAttention | TorchAttention:
    """`choice`: "flash" (KernelError where it cannot be), "torch", or "auto": flash where it can be, else torch with a
    warning. Only flash has an invariant mode on a GPU."""
    model = (num_heads, num_kv_heads, head_dim, block_size, device)
    if choice not in ("auto", "flash", "torch"):
        raise KernelError(f"attention={choice!r}: choose auto, flash or torch")
    if choice == "torch" and invariant:
        raise KernelError("attention='torch' has no batch-invariant mode on a GPU; choose attention='flash'")
    if choice != "torch":
        try:
            return FlashAttention(
                *model,
                dtype=dtype,
                kv_dtype=kv_dtype,
                max_num_reqs=max_num_reqs,
                max_num_blocks=max_num_blocks,
                invariant=invariant,
            )
        except KernelError as error:
            if choice == "flash" or invariant:
                raise
            logger.warning("attention runs in torch, slowly and without CUDA graphs: %s", error)
    return TorchAttention(*model)
