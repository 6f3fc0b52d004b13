"""Pages of e4m3 KV as bf16, for the kernels that a prompt's queries run: memory for one layer at a time.

Why: FlashInfer's kernel for short queries turns e4m3 into bf16 in every warp of queries: once for a decode, which has
one such warp; four times for larger tiles, and again for every tile (one H200: 16 x 64 tokens of 1024 in 100 us instead
of 58). Its kernel for long queries takes e4m3 only with queries and weights in e4m3 too, a second rounding of
everything. So what prompts read is widened once a layer, exactly, and both kernels run as they do over bf16
(`kernels/widen_kv.cu`). Pages lie request by request, one after the other."""

from typing import Protocol

import numpy as np
import torch

from ..sizing import WIDE_TOKENS


class Widens(Protocol):
    """`AttentionLibrary`."""

    def widen(
        self,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        pages: torch.Tensor,
        out_k: torch.Tensor,
        out_v: torch.Tensor,
        /,
    ) -> None: ...


class WidePages:
    """Any one sequence, or as many pages of several."""

    def __init__(self, page: tuple[int, int, int], max_num_blocks: int, device: torch.device) -> None:
        """page: block_size, num_kv_heads, head_dim; `max_num_blocks`: most blocks of one sequence."""
        self.block_size = page[0]
        num_pages = max(max_num_blocks, WIDE_TOKENS // self.block_size)
        made = torch.zeros(2, num_pages, *page, dtype=torch.bfloat16, device=device)
        self.k, self.v = made[0], made[1]
        self.order = torch.arange(num_pages, dtype=torch.int32, device=device)  # a block table of these pages

    def with_room(self, seq_lens: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Those of the `wanted` requests (masks [R]) whose pages find room, in order."""
        fits: np.ndarray = wanted & (np.cumsum(self._counts(seq_lens, wanted)) <= len(self.order))
        return fits

    def place(self, seq_lens: np.ndarray, table: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """table [R, W] -> where each request's pages begin here, and where all end [R + 1]; the blocks to widen [n]."""
        counts = self._counts(seq_lens, chosen)
        starts = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=starts[1:])
        return starts, table[np.arange(table.shape[1]) < counts[:, None]]

    def widen(self, library: Widens, k_cache: torch.Tensor, v_cache: torch.Tensor, blocks: torch.Tensor) -> None:
        library.widen(k_cache, v_cache, blocks, self.k, self.v)

    def _counts(self, seq_lens: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        return np.where(chosen, -(-seq_lens.astype(np.int64) // self.block_size), 0)
