"""Where every physical expert lives, and which copy of a logical expert a token goes to. Immutable and versioned.

A physical id is `ep_rank * slots_per_rank + slot`; the table has a row for every layer of the model (rows of dense layers
hold -1). The choice among copies depends on the token's content-free key alone, so it is the same on every rank and for
every replay within a placement version.
Idea: the physical/logical expert tables of EPLB."""

from dataclasses import dataclass

import torch

from ..errors import EpochError


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """`physical_to_logical` [num_layers, ep_size * slots_per_rank] int32, -1 = empty slot."""

    version: int
    num_logical_experts: int
    ep_size: int
    physical_to_logical: torch.Tensor
