"""Where every physical expert lives, and which copy of a logical expert a token goes to. Immutable and versioned.

A physical id is `ep_rank * slots_per_rank + slot`; the table has a row for every layer of the model (rows of dense
layers hold -1). The choice among copies depends on the token's content-free key alone, so it is the same on every
rank and for every replay within a placement version.

Why NumPy behind `map_to_physical`: a decode step maps a handful of ids in every layer, where a torch call costs several
times the work it does. The derived tables are torch tensors, so a GPU dispatch can hold them in device memory.
Idea: the physical/logical expert tables of EPLB."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from ..errors import EpochError

Int32Array = npt.NDArray[np.int32]

_HEAD = struct.Struct("!4sQIIII")  # magic, version, num_logical_experts, ep_size, num_layers, num_physical_experts
_MAGIC = b"EMP1"


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """`physical_to_logical` [num_layers, ep_size * slots_per_rank] int32, -1 = empty slot."""

    version: int
    num_logical_experts: int
    ep_size: int
    physical_to_logical: torch.Tensor
    logical_to_physical: torch.Tensor = field(init=False)  # [num_layers, num_logical, max_copies] int32, -1 padded
    logical_replica_count: torch.Tensor = field(init=False)  # [num_layers, num_logical] int32
    moe_layers: tuple[int, ...] = field(init=False)
    _copies: Int32Array = field(init=False, repr=False)  # [num_layers, num_logical + 1, max_copies], see map_ids
    _counts: Int32Array = field(init=False, repr=False)  # [num_layers, num_logical + 1]

    def __post_init__(self) -> None:
        table = self.physical_to_logical.to(torch.int32).contiguous()
        self._check(table)
        held = table >= 0
        num_layers, num_physical = table.shape
        columns = torch.where(held, table, self.num_logical_experts).long()
        counts = torch.zeros(num_layers, self.num_logical_experts + 1, dtype=torch.int32)
        counts.scatter_add_(1, columns, torch.ones_like(table))
        counts = counts[:, : self.num_logical_experts].contiguous()
        is_moe = held.any(dim=1)
        if bool((counts[is_moe] == 0).any()):
            layer, logical = (int(i) for i in ((counts == 0) & is_moe[:, None]).nonzero()[0])
            raise EpochError(f"placement {self.version}: expert {logical} of layer {layer} has no physical copy")
        ordered, order = columns.sort(dim=1, stable=True)
        copy_index = torch.arange(num_physical) - torch.searchsorted(ordered, ordered)  # place within its run of copies
        # One more row and one more column than needed: empty slots (sorted last) land in them and are cut off again.
        width = max(1, int(counts.max()) if counts.numel() else 1)
        copies = torch.full((num_layers, self.num_logical_experts + 1, width), -1, dtype=torch.int32)
        real = ordered < self.num_logical_experts
        layers = torch.arange(num_layers)[:, None].expand_as(ordered)
        copies[layers[real], ordered[real], copy_index[real]] = order[real].to(torch.int32)
        set_field = object.__setattr__  # frozen: derived once, here
        set_field(self, "physical_to_logical", table)
        set_field(self, "logical_to_physical", copies[:, : self.num_logical_experts].contiguous())
        set_field(self, "logical_replica_count", counts)
        set_field(self, "moe_layers", tuple(int(i) for i in is_moe.nonzero().flatten()))
        set_field(self, "_copies", copies.numpy())
        padded = torch.nn.functional.pad(counts, (0, 1), value=1).clamp_(min=1)
        set_field(self, "_counts", padded.numpy())

    def _check(self, table: torch.Tensor) -> None:
        if table.dim() != 2 or self.ep_size < 1 or table.shape[1] % self.ep_size:
            raise EpochError(
                f"placement {self.version}: table of shape {tuple(table.shape)}, "
                f"expected [num_layers, n * {self.ep_size}]"
            )
        if table.numel() and (int(table.min()) < -1 or int(table.max()) >= self.num_logical_experts):
            raise EpochError(
                f"placement {self.version}: logical ids {int(table.min())}..{int(table.max())}, "
                f"expected -1..{self.num_logical_experts - 1}"
            )

    @property
    def num_layers(self) -> int:
        return self.physical_to_logical.shape[0]

    @property
    def num_physical_experts(self) -> int:
        return self.physical_to_logical.shape[1]

    @property
    def slots_per_rank(self) -> int:
        return self.physical_to_logical.shape[1] // self.ep_size

    def local_slots(self, layer_id: int, ep_rank: int) -> torch.Tensor:
        """[slots_per_rank] int32: the logical expert in each slot of this rank, -1 = empty."""
        slots = self.slots_per_rank
        return self.physical_to_logical[layer_id, ep_rank * slots : (ep_rank + 1) * slots]

    def map_to_physical(self, layer_id: int, topk_ids: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """[num_tokens, top_k] logical ids -> physical ids, -1 stays -1. `key` [num_tokens] picks among copies."""
        mapped = self.map_ids(layer_id, topk_ids.numpy(), key.numpy())
        return torch.from_numpy(mapped)

    def map_ids(self, layer_id: int, ids: Int32Array, key: npt.NDArray[np.int64]) -> Int32Array:
        """`map_to_physical` on arrays. Id -1 reads the extra last row of the tables, whose only copy is -1."""
        copies = self._copies[layer_id]
        if copies.shape[1] == 1:
            only: Int32Array = copies[:, 0]
            return only.take(ids, mode="wrap") if ids.size else np.empty(ids.shape, np.int32)
        chosen: Int32Array = copies[ids, (key[:, None] + ids) % self._counts[layer_id][ids]]
        return chosen

    def encode(self) -> bytes:
        """Version-marked bytes for a socket; no pickle."""
        num_layers, num_physical = self.physical_to_logical.shape
        head = _HEAD.pack(_MAGIC, self.version, self.num_logical_experts, self.ep_size, num_layers, num_physical)
        return head + self.physical_to_logical.numpy().astype("<i4").tobytes()

    @classmethod
    def decode(cls, data: bytes) -> "Placement":
        if len(data) < _HEAD.size or data[:4] != _MAGIC:
            raise EpochError(f"not a placement of this version ({len(data)} bytes)")
        _, version, num_logical, ep_size, num_layers, num_physical = _HEAD.unpack_from(data)
        if len(data) != _HEAD.size + 4 * num_layers * num_physical:
            raise EpochError(f"placement {version}: {len(data)} bytes, table [{num_layers}, {num_physical}] expected")
        table = np.frombuffer(data, dtype="<i4", offset=_HEAD.size).reshape(num_layers, num_physical).astype(np.int32)
        return cls(version, num_logical, ep_size, torch.from_numpy(table))


def uniform(
    num_layers: int,
    num_logical: int,
    ep_size: int,
    num_redundant: int = 0,
    *,
    moe_layers: Sequence[int] | None = None,
    version: int = 1,
) -> Placement:
    """The same even table for every MoE layer: contiguous runs of experts a rank, then `num_redundant` more copies.

    A redundant copy goes to the emptiest rank that does not hold the expert yet, so one death leaves a copy."""
    held: list[list[int]] = [[] for _ in range(ep_size)]
    home = [logical * ep_size // num_logical for logical in range(num_logical)]
    for logical, ep_rank in enumerate(home):
        held[ep_rank].append(logical)
    # Copies are dealt rank by rank (first expert of every rank, then the second ...), so that few spread over all
    # ranks.
    dealt = sorted(range(num_logical), key=lambda logical: (logical - home.index(home[logical]), home[logical]))
    for i in range(num_redundant if num_logical else 0):
        logical = dealt[i % num_logical]
        target = min(
            range(ep_size), key=lambda r: (logical in held[r], len(held[r]), (r - home[logical] - 1) % ep_size)
        )
        held[target].append(logical)
    slots = max((len(h) for h in held), default=0)
    row = [logical for h in held for logical in h + [-1] * (slots - len(h))]
    table = torch.full((num_layers, len(row)), -1, dtype=torch.int32)
    for layer_id in range(num_layers) if moe_layers is None else moe_layers:
        table[layer_id] = torch.tensor(row, dtype=torch.int32)
    return Placement(version, num_logical, ep_size, table)
