"""Launches of nccl_pack.cu: ids to messages, messages to rows, computed rows to answers, for the exchange over NCCL.

`facts` and what a message holds are laid out here, since kernels, reference and exchange share them. In the *padded*
form `places` and `counts` are None: everything stands at its token. In the *bounded* one, which is padded on the way
there, `bound` places are for the answers of one owner to one source, close together in the order of their pairs, and
`pairs` says how many a token has, on either side. In the *exact* one `count` decides, on the device, what stands where;
the owner finds its answers' places from a number that comes with each row, so it counts nothing."""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from .checks import require, require_sizes
from .jit import Kernel

KEY_SHIFT, NUM_SLOTS, NO_PLACE, BAD_ROW, BAD_ANSWER = range(5)  # of `facts`, [4 + num_owners] int64
NONE = (1 << 63) - 1  # nothing was bad
TABLE_WIDTH = 8  # of the table of copies: their number, then up to 7 of them as ep_rank << 16 | slot
MAX_SLOTS = 0xFFFF  # of a rank; that many is none in a message
_MAX_SOURCES = 64
_WARPS, _UNIT_BYTES, _MAX_BLOCKS = 4, 2048, 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class PackSizes:
    """One rank's part in one membership."""

    num_sources: int
    num_owners: int
    own_source: int  # index, -1 = not one
    own_owner: int
    hidden: int
    top_k: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        return self.hidden * self.dtype.itemsize

    @property
    def message_bytes(self) -> int:
        """Of a row, a number and its slots, two bytes each."""
        return self.row_bytes + (4 + 2 * self.top_k + 15) // 16 * 16

    @property
    def has_kernels(self) -> bool:
        known = self.dtype in (torch.bfloat16, torch.float32) and self.row_bytes % 16 == 0
        return known and self.top_k <= 32 and self.num_sources <= _MAX_SOURCES


class NcclPack:
    """The kernels for one membership. Each method is one launch, or none where there is nothing to move."""

    def __init__(self, sizes: PackSizes, device: torch.device) -> None:
        require_sizes(sizes.has_kernels, f"no kernel packs rows of {sizes}")
        self._sizes, self._device = sizes, device
        self._units_per_row = -(-sizes.row_bytes // _UNIT_BYTES)
        names = ("count", "pack", "unpack", "pack_answers", "pack_bounded", "unpack_answers")
        is_float32 = sizes.dtype == torch.float32
        self._kernels = {name: pack_kernel(name, sizes.hidden, sizes.top_k, is_float32) for name in names}

    def load(self) -> None:
        """Compile and load now, so that neither a capture nor a peer waits for it."""
        for kernel in self._kernels.values():
            kernel.load(self._device)

    def count(
        self,
        ids: torch.Tensor,  # [T, top_k] int32
        table: torch.Tensor,  # [num_layers, num_logical, TABLE_WIDTH] int32
        facts: torch.Tensor,
        places: torch.Tensor,  # [num_owners, T, 2] int32: a token's row and first pair among those that go there
        counts: torch.Tensor,  # [num_owners + num_sources, 2] int32: rows and pairs that go, and that come
        *,
        layer_id: int,
    ) -> None:
        sizes = self._sizes
        require("topk_ids", ids, torch.int32, (None, sizes.top_k))
        if not ids.shape[0]:
            return
        self._kernels["count"].launch(
            (sizes.num_owners,),
            1024,
            (
                ids,
                table,
                facts,
                places,
                counts,
                np.int32(table.shape[1]),
                np.int32(ids.shape[0]),
                np.int32(layer_id),
                np.int32(sizes.num_owners),
                np.int32(sizes.own_owner),
                np.int32(sizes.own_source),
            ),
            device=self._device,
        )

    def pack(
        self,
        x: torch.Tensor,  # [T, hidden]
        ids: torch.Tensor,
        table: torch.Tensor,
        facts: torch.Tensor,
        messages: torch.Tensor,  # out, [rows for other owners, message_bytes] uint8
        rows: torch.Tensor,  # out, [R, hidden]: own ones
        slots: torch.Tensor,  # out, [R, top_k] int32: of own rows
        where: torch.Tensor,  # out, [T, top_k] int32: owners
        *,
        layer_id: int,
        stride: int,
        own_begin: int,  # of own rows among all
        places: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
        pairs: torch.Tensor | None = None,  # out, [num_owners, pairs_pitch(stride)] uint8: of each token, bounded form
    ) -> None:
        sizes = self._sizes
        require("rows", x, sizes.dtype, (None, sizes.hidden))
        require("topk_ids", ids, torch.int32, (x.shape[0], sizes.top_k))
        arguments = (
            x,
            ids,
            table,
            facts,
            places,
            counts,
            messages,
            rows,
            slots,
            where,
            pairs,
            np.int32(table.shape[1]),
            np.int32(x.shape[0]),
            np.int32(stride),
            np.int32(layer_id),
            np.int32(sizes.num_owners),
            np.int32(sizes.own_owner),
            np.int32(own_begin),
            _pitch(pairs),
        )
        self._launch("pack", x.shape[0] if places is not None else stride, arguments)

    def unpack(
        self,
        messages: torch.Tensor,
        facts: torch.Tensor,
        rows: torch.Tensor,  # out
        slots: torch.Tensor,  # out
        *,
        own: tuple[int, int],  # rows that are there already
        stride: int,  # 0 = exact
        named: int,  # a bit for each source that sent
        pairs: torch.Tensor | None = None,  # out, [num_sources, pairs_pitch(stride)] uint8: of each row, bounded form
    ) -> None:
        numbers = (np.int32(rows.shape[0]), np.int32(own[0]), np.int32(own[1]), np.int32(stride), np.uint64(named))
        arguments = (messages, facts, rows, slots, pairs, *numbers, _pitch(pairs))
        self._launch("unpack", rows.shape[0], arguments)

    def pack_answers(
        self,
        expert_rows: torch.Tensor,  # [R, top_k, hidden]
        slots: torch.Tensor,
        messages: torch.Tensor,  # that brought the rows
        counts: torch.Tensor,
        answers: torch.Tensor,  # out, [pairs of other sources, hidden]
        *,
        own: tuple[int, int],
    ) -> None:
        """Exact form only."""
        sizes = self._sizes
        of_each = -(-messages.shape[0] // sizes.num_sources)  # about: the grid may be any
        arguments = (expert_rows, slots, messages, counts[sizes.num_owners :], answers, np.int32(sizes.own_source))
        self._launch("pack_answers", of_each, arguments, num_sources=sizes.num_sources)

    def pack_bounded(
        self,
        expert_rows: torch.Tensor,  # [R, top_k, hidden]
        slots: torch.Tensor,
        pairs: torch.Tensor,
        answers: torch.Tensor,  # out, [other sources x bound, hidden]
        *,
        stride: int,
        bound: int,
        named: int,
    ) -> None:
        """Bounded form only. A pair without a place does not travel; its source finds that out by itself."""
        sizes = self._sizes
        numbers = (np.int32(sizes.own_source), np.int32(stride), np.int32(bound), np.uint64(named), _pitch(pairs))
        arguments = (expert_rows, slots, pairs, answers, *numbers)
        self._launch("pack_bounded", stride * sizes.top_k, arguments, num_sources=sizes.num_sources)

    def unpack_answers(
        self,
        expert_rows: torch.Tensor,
        answers: torch.Tensor,  # [rows of other owners, top_k, hidden]; exact: [pairs, hidden]; bounded: as they travel
        where: torch.Tensor,
        facts: torch.Tensor,
        y: torch.Tensor,  # out, [T, top_k, hidden]; pairs without an owner stay as they are
        *,
        layer_id: int,
        stride: int,
        own_begin: int,
        places: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
        pairs: torch.Tensor | None = None,
        bound: int = 0,
    ) -> None:
        numbers = (y.shape[0], stride, layer_id, self._sizes.own_owner, own_begin, bound)
        arguments = (expert_rows, answers, where, facts, places, counts, pairs, y, *map(np.int32, numbers))
        self._launch("unpack_answers", y.shape[0] * self._sizes.top_k, (*arguments, _pitch(pairs)))

    def _launch(self, name: str, num_rows: int, arguments: tuple[object, ...], *, num_sources: int = 1) -> None:
        """What ran before may be NCCL's: it allows no kernel to come early, so ours is there when it ends."""
        if num_rows:
            blocks = min(-(-num_rows * self._units_per_row // _WARPS), _MAX_BLOCKS)
            self._kernels[name].launch((blocks, num_sources), 32 * _WARPS, arguments, device=self._device)


def pairs_pitch(stride: int) -> int:
    """Bytes of a line of `pairs`."""
    return -(-stride // 16) * 16


def _pitch(pairs: torch.Tensor | None) -> np.int32:
    return np.int32(0 if pairs is None else pairs.shape[1])


@functools.cache
def pack_kernel(name: str, hidden: int, top_k: int, is_float32: bool) -> Kernel:
    return Kernel("nccl_pack.cu", name, {"HIDDEN": hidden, "TOP_K": top_k, "FLOAT32": int(is_float32)})
