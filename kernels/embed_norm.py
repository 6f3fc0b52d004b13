"""Embedding rows and their first norm in one launch. Ids below 0 stand for tokens that only the device knows yet: what
the sampler drew for a slot in the step before, so that the host need not wait for it to schedule the next one."""

import functools

import numpy as np
import torch

from .add_norm import norm_threads
from .checks import require
from .jit import Kernel

BF16 = torch.bfloat16


def embed_rms_norm(
    table: torch.Tensor,
    token_ids: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    last_token: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """table [V, H] bf16, token_ids [T] int64 -> residual [T, H] bf16 (the rows) and their norm times weight [H].
    An id below 0 is the last token of slot -1 - id, read from `last_token` [num_slots] int64. A row whose id is in no
    vocabulary is NaN, which the sampler reports."""
    vocab_size, hidden = table.shape
    num_tokens = token_ids.shape[0]
    require("table", table, BF16, (None, None))
    require("token_ids", token_ids, torch.int64, (None,))
    require("weight", weight, BF16, (hidden,))
    if last_token is not None:
        require("last_token", last_token, torch.int64, (None,))
    residual, out = (torch.empty(num_tokens, hidden, dtype=BF16, device=table.device) for _ in range(2))
    if num_tokens:
        embed_norm_kernel(hidden).launch(
            (num_tokens,),
            norm_threads(hidden),
            (table, np.int64(vocab_size), token_ids, last_token, weight, np.float32(eps), residual, out),
            device=table.device,
        )
    return residual, out


@functools.cache
def embed_norm_kernel(hidden: int) -> Kernel:
    return Kernel("embed_norm.cu", "embed_rms_norm", {"HIDDEN": hidden, "THREADS": norm_threads(hidden)})
