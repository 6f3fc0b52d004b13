"""Launches of peer_exchange.cu: rows to the experts' GPUs and back through the peers' memory.

What lies where in a rank's buffer is decided here (`PeerBuffer`), since the kernels write at addresses: control block,
then an owner's rows and slots, then a source's answers. Everything is sized once for `capacity` rows a source; a turn
of fewer rows uses the front of each part, packed by its own stride. Single buffers suffice: a source sends its next
turn only after every owner has answered the last one, and its first turn of a step only after every owner has granted
it, at which time that owner has read all of the step before; an owner writes a source's answers only after it got that
turn's rows, which the source sends after it has read the answers of the turn before."""

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import KernelError
from .jit import Kernel
from .launch import Struct

CONTROL_BYTES = 4096
POISON_AT = 768  # u32
VERDICT_AT, VERDICT_BYTES = 768, 832  # poison, bad_return [64] u64, error u64, bad_dispatch u64
BAD_RETURN_AT, ERROR_AT, BAD_DISPATCH_AT = 1024 - VERDICT_AT, 1536 - VERDICT_AT, 1544 - VERDICT_AT
NONE = (1 << 64) - 1
CREDIT, ARRIVAL, ANSWER = range(3)  # what a wait was for
LATE, POISONED = 1, 2  # why it did not end well
MAX_RANKS = 64
MAX_SLOTS = 512
TABLE_WIDTH = 8  # of the table of copies: their number, then up to 7 of them as ep_rank << 16 | slot
_WARPS, _UNIT_BYTES = 8, 2048
_MAX_BLOCKS = {"dispatch": 64, "answer": 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerBuffer:
    """Offsets in the buffer of a rank with these roles; the same arithmetic on every rank."""

    num_sources: int
    capacity: int  # most rows of a source in one turn
    row_bytes: int
    top_k: int
    is_owner: bool
    is_source: bool

    @property
    def rows_at(self) -> int:
        return CONTROL_BYTES

    @property
    def slots_at(self) -> int:
        return CONTROL_BYTES + (self.num_sources * self.capacity * self.row_bytes if self.is_owner else 0)

    @property
    def answers_at(self) -> int:
        slots = self.num_sources * self.capacity * self.top_k * 4 if self.is_owner else 0
        return (self.slots_at + slots + 255) // 256 * 256

    @property
    def num_bytes(self) -> int:
        return self.answers_at + (self.capacity * self.top_k * self.row_bytes if self.is_source else 0)


def initial_control() -> bytes:
    """A control block before the first step."""
    block = bytearray(CONTROL_BYTES)
    for at in (1536, 1544, *range(1024, 1536, 8)):  # error, bad_dispatch, bad_return
        block[at : at + 8] = b"\xff" * 8
    return bytes(block)


def mesh_argument(
    own: int,
    owners: Sequence[tuple[int, int, PeerBuffer]],  # (rank, base address here, layout) by ep_rank
    sources: Sequence[tuple[int, int, PeerBuffer]],
    *,
    own_owner: int,
    own_source: int,
) -> bytes:
    """`struct Mesh` of the kernels: by value, so that a launch reads it from the constant bank."""
    words = [
        own,
        *[base for _, base, _ in owners],
        *[base for _, base, _ in sources],
        *[base + layout.rows_at for _, base, layout in owners],
        *[base + layout.slots_at for _, base, layout in owners],
        *[base + layout.answers_at for _, base, layout in sources],
    ]
    ints = [*[rank for rank, _, _ in owners], *[rank for rank, _, _ in sources], own_owner, own_source]
    packed = struct.pack(f"<{len(words)}Q{len(ints)}i", *words, *ints)
    return packed + b"\0" * (-len(packed) % 8)


class PeerKernels:
    """The three kernels for one membership."""

    def __init__(
        self,
        mesh: bytes,
        *,
        num_sources: int,
        num_owners: int,
        owns: bool,  # this rank owns experts
        hidden: int,
        top_k: int,
        dtype: torch.dtype,
        early_next: bool,
        device: torch.device,
    ) -> None:
        row_bytes = hidden * dtype.itemsize
        if dtype not in (torch.bfloat16, torch.float32) or row_bytes % 16 or not 0 < top_k <= 32:
            raise KernelError(
                f"peer exchange takes bfloat16 or float32 rows of whole 16 bytes and top_k up to 32, got {dtype} "
                f"[{hidden}] and {top_k}; use exchange.backend=nccl"
            )
        if num_sources > MAX_RANKS or num_owners > MAX_RANKS:
            raise KernelError(f"peer exchange takes up to {MAX_RANKS} ranks of a role, got {num_sources}, {num_owners}")
        self._mesh, self._device, self._owns = Struct(mesh), device, owns
        self._num_sources = num_sources
        self._units_per_row = -(-row_bytes // _UNIT_BYTES)
        self._top_k = top_k
        sizes = (hidden, top_k, num_sources, num_owners, dtype == torch.float32, early_next)
        self._begin, self._dispatch, self._answer = (
            peer_kernel(name, *sizes) for name in ("begin", "dispatch", "answer")
        )

    def load(self) -> None:
        """Compile and load now, so that neither a capture nor a peer waits for it."""
        for kernel in (self._begin, self._dispatch, self._answer):
            kernel.load(self._device)

    def begin(self, sources: int, timeout_s: float, key_shift: int) -> None:
        """`sources`: a bit for each that is named in the step."""
        arguments = (self._mesh, np.uint64(sources), np.uint64(int(timeout_s * 1e9)), np.uint32(key_shift))
        self._begin.launch((1,), 64, arguments, device=self._device)

    def dispatch(
        self,
        x: torch.Tensor | None,  # [T, hidden]
        topk_ids: torch.Tensor | None,  # [T, top_k] int32
        table: torch.Tensor,  # [num_layers, num_logical, TABLE_WIDTH] int32
        *,
        stride: int,
        layer_id: int,
        is_first: bool,
    ) -> None:
        num_tokens = 0 if x is None else x.shape[0]
        units = 1 if x is None else stride * self._units_per_row
        self._dispatch.launch(
            (_blocks(units, "dispatch"),),
            32 * _WARPS,
            (
                self._mesh,
                x,
                topk_ids,
                table,
                np.int32(table.shape[1]),
                np.int32(num_tokens),
                np.int32(stride),
                np.int32(layer_id),
                np.int32(is_first),
            ),
            device=self._device,
        )

    def answer(
        self,
        expert_rows: torch.Tensor,  # [num_sources * stride, top_k, hidden]
        *,
        stride: int,
        layer_id: int,
    ) -> None:
        units = stride * self._top_k * self._units_per_row
        grid = (_blocks(units, "answer"), self._num_sources) if self._owns else (1, 1)
        arguments = (self._mesh, expert_rows, np.int32(stride), np.int32(layer_id))
        self._answer.launch(grid, 32 * _WARPS, arguments, device=self._device)


def load_peer_kernels(
    num_sources: int,
    num_owners: int,
    hidden: int,
    top_k: int,
    dtype: torch.dtype,
    early_next: bool,
    device: torch.device,
) -> None:
    """Compile and load what a membership needs, before anybody waits for it."""
    for name in ("begin", "dispatch", "answer"):
        sizes = (hidden, top_k, num_sources, num_owners, dtype == torch.float32, early_next)
        peer_kernel(name, *sizes).load(device)


def set_max_blocks(**blocks: int) -> None:
    """For the bench: most blocks of `dispatch` and of `answer` (for each source)."""
    _MAX_BLOCKS.update(blocks)


def _blocks(units: int, name: str) -> int:
    return max(1, min(-(-units // _WARPS), _MAX_BLOCKS[name]))


@functools.cache
def peer_kernel(
    name: str, hidden: int, top_k: int, num_sources: int, num_owners: int, is_float32: bool, early_next: bool
) -> Kernel:
    defines = {"HIDDEN": hidden, "TOP_K": top_k, "NUM_SOURCES": num_sources, "NUM_OWNERS": num_owners}
    return Kernel("peer_exchange.cu", name, {**defines, "FLOAT32": int(is_float32), "EARLY_NEXT": int(early_next)})
