"""A wire that turns bits over: a Gloo group behind which a copy of some messages leaves with one bit changed.

The seam is `ClusterMesh._build_group`: everything above it, from the message's layout to the replay of the step, is
what serves. Any bit of any message may fall: rows, checksums, slot ids, counts, verdicts."""

import random
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed import ProcessGroup, Work

from ..router.epoch import Epoch
from ..router.mesh import ClusterMesh


@dataclass(frozen=True, slots=True)
class Flip:
    """`turn` = index of the layer in the step, the number of layers for a verdict."""

    step_id: int
    turn: int
    is_return: bool
    sender: int  # communicator ranks
    receiver: int
    bit: int  # of the message
    in_rows: bool  # else in what describes them


class FlippingWire:
    """Everything but `send` is the group's own."""

    def __init__(
        self, group: ProcessGroup, *, num_layers: int, row_words: int, rate: float, generator: random.Random
    ) -> None:
        self._group, self._num_layers, self._row_words = group, num_layers, row_words
        self.rate, self._generator = rate, generator
        self.flips: list[Flip] = []

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work:
        (tensor,) = tensors
        if tensor.numel() and self._generator.random() < self.rate:
            tensor = tensor.clone()  # the sender's own memory stays as it is
            self._flip(tensor, peer, tag)
        return cast(Work, self._group.send([tensor], peer, tag))

    def _flip(self, tensor: torch.Tensor, peer: int, tag: int) -> None:
        data = tensor.view(-1).view(torch.uint8).numpy()
        bit = self._generator.randrange(8 * data.size)
        data[bit // 8] ^= 1 << bit % 8
        turn_of_all, direction = divmod(tag, 2)
        step_id, turn = divmod(turn_of_all, self._num_layers + 1)
        is_verdict = turn == self._num_layers
        # Rows are the last words of a dispatch message; an answer is nothing but rows.
        num_row_words = int(tensor.view(-1).view(torch.int32)[1]) * self._row_words if direction == 0 else 0
        in_rows = not is_verdict and (direction == 1 or bit // 32 >= tensor.numel() - num_row_words)
        self.flips.append(Flip(step_id, turn, direction == 1, self._group.rank(), peer, bit, in_rows))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


class FlippingMesh(ClusterMesh):
    """A member of the mesh on such a wire; set `rate` (of messages) and `generator` before the first epoch."""

    rate = 0.0
    generator = random.Random(0)

    def _build_group(self, epoch: Epoch, rank: int) -> ProcessGroup:
        shape = self._shape
        self.wire = FlippingWire(
            super()._build_group(epoch, rank),
            num_layers=len(epoch.placement.moe_layers),
            row_words=shape.hidden_size * shape.dtype.itemsize // 4,
            rate=self.rate,
            generator=self.generator,
        )
        return cast(ProcessGroup, self.wire)
