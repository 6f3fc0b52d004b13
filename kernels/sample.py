"""Logits to next ids on the device, with each slot's sampling parameters, draw position and thinking state held there.

Why: a step that samples on the host ends with a wait, and the next one cannot be scheduled before it. Greedy rows cost
one pass over the logits by all of the GPU and a small second kernel; a drawn row goes on in that second kernel, one CTA
a row. The rule is the host sampler's (`cluster/attention/draw.py`, `thinking.py`); sums are float64 in an order that
the row alone fixes, so a draw depends on neither the batch nor on luck."""

import functools

import numpy as np
import torch

from .checks import require, require_sizes
from .jit import Kernel

MAX_CLOSING = 104  # tokens of a closing sentence that a slot has room for
BLOCK_IDS = 256  # as in sample.cuh
SLOT_BYTES = 512
# One slot's state; the same fields as `Slot` in sample.cuh.
SLOT = np.dtype(
    [
        *((name, np.float64) for name in ("temperature", "top_p", "min_p")),
        *((name, np.uint64) for name in ("seed", "position")),
        ("last_token", np.int64),
        *((name, np.int32) for name in ("slot", "top_k", "has_thinking", "think_id", "end_think_id")),
        *((name, np.int32) for name in ("budget", "inside", "num_spent", "cursor", "num_closing")),
        ("closing", np.int32, (MAX_CLOSING,)),
        ("unused", np.int32, (2,)),
    ]
)
assert SLOT.itemsize == SLOT_BYTES


def admit_slots(staged: torch.Tensor, state: torch.Tensor, last_token: torch.Tensor) -> None:
    """staged [n, 512] uint8 (records of SLOT, no slot twice) -> their places in state [num_slots, 512] uint8 and in
    last_token [num_slots] int64."""
    require("staged", staged, torch.uint8, (None, SLOT_BYTES))
    require("state", state, torch.uint8, (None, SLOT_BYTES))
    require("last_token", last_token, torch.int64, (state.shape[0],))
    if staged.shape[0]:
        sample_kernel("sample_admit", False, True).launch(
            (staged.shape[0],), 32, (staged, state, last_token), device=state.device
        )


def sample_rows(
    logits: torch.Tensor, vocab_size: int, slots: torch.Tensor, state: torch.Tensor, last_token: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [S, >= vocab_size] bf16 or float32, slots [S] int32 (-1 = padding, no slot twice) -> ids [S] int64, flags
    [S] uint8: 1 the row's largest logit is finite, 2 the token was forced. Each slot's state and last token move on by
    that token. Ids from vocab_size on are never chosen."""
    num_rows, stride = logits.shape
    is_float = logits.dtype == torch.float32
    require("logits", logits, torch.float32 if is_float else torch.bfloat16, (None, None))
    require("slots", slots, torch.int32, (num_rows,))
    require("state", state, torch.uint8, (None, SLOT_BYTES))
    require("last_token", last_token, torch.int64, (state.shape[0],))
    require_sizes(0 < vocab_size <= stride, f"vocab_size must be 1 to {stride}, the logits' width, got {vocab_size}")
    require_sizes(num_rows < 65536, f"sample_rows takes up to 65535 rows, got {num_rows}")
    ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    flags = torch.empty(num_rows, dtype=torch.uint8, device=logits.device)
    if not num_rows:
        return ids, flags
    num_blocks = -(-vocab_size // BLOCK_IDS)
    best = torch.empty(num_rows, num_blocks, dtype=torch.int64, device=logits.device)
    mass = torch.empty(num_rows, num_blocks, dtype=torch.float64, device=logits.device)
    is_aligned = stride % 8 == 0 and logits.data_ptr() % 16 == 0
    head = (logits, np.int64(stride), np.int32(vocab_size), np.int32(num_blocks), slots, state)
    sample_kernel("sample_scan", is_float, is_aligned).launch(
        (-(-num_blocks // 16), num_rows), 256, (*head, best, mass), device=logits.device
    )
    sample_kernel("sample_choose", is_float, is_aligned).launch(
        (num_rows,), 512, (*head, last_token, best, mass, ids, flags), device=logits.device
    )
    return ids, flags


def uniforms(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[n] int64 each (the bits of uint64) -> [n] float64 in [0, 1): what a draw at this position uses."""
    require("seeds", seeds, torch.int64, (None,))
    require("positions", positions, torch.int64, seeds.shape)
    out = torch.empty(seeds.shape[0], dtype=torch.float64, device=seeds.device)
    if seeds.shape[0]:
        sample_kernel("sample_uniforms", False, True).launch(
            (-(-seeds.shape[0] // 32),), 32, (seeds, positions, np.int32(seeds.shape[0]), out), device=seeds.device
        )
    return out


@functools.cache
def sample_kernel(name: str, is_float: bool, is_aligned: bool) -> Kernel:
    return Kernel("sample.cu", name, {"LOGITS_F32": int(is_float), "ALIGNED": int(is_aligned)})
