"""What an expert's bytes and products must be: read from the checkpoint a second time, computed the plainest way.

A **truth** is one expert's block checksums (`router/guard.py`, a sum for every 16 KiB) and its **golden rows**: the
products of fixed input rows by the reference path, two plain products over a scratch copy, without slots, segments or
batches. It is made once in a process for each expert, or comes with a copy from the process that made it, and does not
depend on where copies are, so it judges every copy that comes later: loaded from disk, copied from memory, from a peer,
repaired. The second reading is what makes it worth something: damage between file and memory, a wrong slice, a wrong
slot or a product that is wrong on this machine all show as a difference before the shard reports READY.

Tolerance: none in batch-invariant mode, where a row's bits depend on the row and the expert alone. Otherwise the
largest error may be `TOLERANCE` of the row's largest value. Experts packed on a GPU are checked by neither yet."""

import threading
from dataclasses import dataclass

import numpy as np
import torch

from ..checkpoint import Checkpoint
from ..numerics import Numerics, silu_mul
from ..router.guard import Int64Array, checksums
from .weights import read_expert

NUM_GOLDEN_ROWS = 2
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
_BLOCK_WORDS = 4096


def num_blocks(num_bytes: int) -> int:
    """Checksums of so many bytes."""
    return -(-num_bytes // (4 * _BLOCK_WORDS))


def block_checksums(weights: torch.Tensor) -> Int64Array:
    """[num_blocks] of a contiguous tensor in host memory; the last block is padded with zeros."""
    data = weights.view(-1).view(torch.uint8).numpy()
    whole = data.size // (4 * _BLOCK_WORDS) * 4 * _BLOCK_WORDS
    sums = checksums(data[:whole].view(np.int32).reshape(-1, _BLOCK_WORDS))
    if whole == data.size:
        return sums
    tail = np.zeros(4 * _BLOCK_WORDS, dtype=np.uint8)
    tail[: data.size - whole] = data[whole:]
    return np.concatenate([sums, checksums(tail.view(np.int32)[None])])


@dataclass(frozen=True, slots=True, eq=False)
class ExpertTruth:
    """One expert of one layer, in the dtype of this process."""

    w13_sums: Int64Array
    w2_sums: Int64Array
    golden: torch.Tensor  # [NUM_GOLDEN_ROWS, hidden]

    def fits(self, w13: torch.Tensor, w2: torch.Tensor) -> bool:
        """Whether these are the expert's very bytes."""
        return np.array_equal(block_checksums(w13), self.w13_sums) and np.array_equal(block_checksums(w2), self.w2_sums)


class Truths:
    """Of all experts that this process has met. One lock-free dict: a truth made twice is the same truth."""

    def __init__(self, checkpoint: Checkpoint, numerics: Numerics, dtype: torch.dtype) -> None:
        self._checkpoint, self._numerics, self._dtype = checkpoint, numerics, dtype
        hidden = checkpoint.config.hidden_size
        generator = torch.Generator().manual_seed(hidden)
        self.rows = torch.randn(NUM_GOLDEN_ROWS, hidden, generator=generator).to(dtype)
        self._known: dict[tuple[int, int], ExpertTruth] = {}
        self._scratch = threading.local()  # one expert's room for each thread that makes truths

    def of(self, layer_id: int, logical: int) -> ExpertTruth:
        key = (layer_id, logical)
        if key not in self._known:
            w13, w2 = self._room()
            read_expert(self._checkpoint, layer_id, logical, w13, w2)
            self._known[key] = self._make(w13, w2)
        return self._known[key]

    def known(self, layer_id: int, logical: int) -> ExpertTruth | None:
        """None where it would have to be made."""
        return self._known.get((layer_id, logical))

    def learn(self, layer_id: int, logical: int, truth: ExpertTruth) -> None:
        """One that another process made (`copies.py`); what was made here stays."""
        self._known.setdefault((layer_id, logical), truth)

    def forget(self, layer_id: int, logical: int) -> None:
        self._known.pop((layer_id, logical), None)

    def read(self, layer_id: int, logical: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy from disk: w13 [2 * width, hidden], w2 [hidden, width]. CheckpointError where it cannot be."""
        w13, w2 = self.empty()
        read_expert(self._checkpoint, layer_id, logical, w13, w2)
        return w13, w2

    def empty(self) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, width = self._checkpoint.config.hidden_size, self._checkpoint.config.moe_intermediate_size
        return torch.empty(2 * width, hidden, dtype=self._dtype), torch.empty(hidden, width, dtype=self._dtype)

    def _room(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Used again and again: memory that is taken and given back for every expert is not all given back."""
        if not hasattr(self._scratch, "room"):
            self._scratch.room = self.empty()
        room: tuple[torch.Tensor, torch.Tensor] = self._scratch.room
        return room

    def is_golden(self, layer_id: int, logical: int, products: torch.Tensor) -> bool:
        """Whether `products` [NUM_GOLDEN_ROWS, hidden] of `rows` are what they must be."""
        golden = self.of(layer_id, logical).golden
        if self._numerics.batch_invariant:
            return torch.equal(products, golden)
        error = (products.float() - golden.float()).abs().amax(dim=1)
        return bool((error <= TOLERANCE[self._dtype] * golden.float().abs().amax(dim=1)).all())

    @torch.inference_mode()
    def _make(self, w13: torch.Tensor, w2: torch.Tensor) -> ExpertTruth:
        linear = self._numerics.linear
        golden = linear(silu_mul(linear(self.rows, w13)), w2)
        return ExpertTruth(block_checksums(w13), block_checksums(w2), golden)
