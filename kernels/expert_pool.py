"""Places for one layer's experts in the kernels' form: they come and go while others are being multiplied by.

Why: a rebalance must change neither an address that a CUDA graph holds nor an expert that a running step reads. So a
layer's tensors have a fixed number of places, a new expert goes into a free one, and which id means which place is
the `expert_map` that the kernels read from device memory."""

import copy
import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch

from ..errors import KernelError
from .expert_layer import ExpertLayer


class ExpertPool:
    """`num_places` experts of one form and size; a place holds one logical expert, or nothing of meaning (-1)."""

    def __init__(self, template: ExpertLayer, num_places: int) -> None:
        """`template` gives form and sizes; nothing of it is kept."""
        self.layer = copy.copy(template)
        self.layer.num_local_experts = num_places
        self.logical_ids = [-1] * num_places
        empty: dict[str, Any] = {name: t.new_empty(num_places, *t.shape[1:]) for name, t in _tensors(template).items()}
        if template.packed is None:
            self.layer.natural = tuple(empty.get(str(i)) for i in range(len(template.natural)))  # type: ignore[assignment]
        else:
            self.layer.packed = dataclasses.replace(template.packed, **empty)

    def put(self, place: int, logical_id: int, source: ExpertLayer, source_place: int = 0) -> None:
        """Copy one expert of a layer of the same form into `place`, on the current stream. Raises KernelError where the
        forms differ (one expert has zero points of its own, the others none)."""
        self._check_kind(source)
        self.logical_ids[place] = -1  # holds neither the old nor the new one until all of it is there
        theirs = _tensors(source)
        for name, tensor in _tensors(self.layer).items():
            tensor[place].copy_(theirs[name][source_place])
        self.logical_ids[place] = logical_id

    def put_all(self, places: Sequence[int], logical_ids: Sequence[int], source: ExpertLayer) -> None:
        """`put` of a layer's experts 0, 1, ... into `places`; where these follow one another, one copy a tensor."""
        first, num = (places[0] if places else 0), len(places)
        if list(places) != list(range(first, first + num)):
            for i, (place, logical) in enumerate(zip(places, logical_ids, strict=True)):
                self.put(place, logical, source, i)
            return
        self._check_kind(source)
        self.logical_ids[first : first + num] = [-1] * num
        theirs = _tensors(source)
        for name, tensor in _tensors(self.layer).items():
            tensor[first : first + num].copy_(theirs[name][:num])
        self.logical_ids[first : first + num] = list(logical_ids)

    def _check_kind(self, source: ExpertLayer) -> None:
        if _kind(source) != _kind(self.layer):
            raise KernelError(f"an expert of form {_kind(source)} in a layer of form {_kind(self.layer)}")

    def free_places(self, used: Collection[int], wanted: Sequence[int]) -> list[int]:
        """Places that nobody uses and that hold nothing wanted, empty ones first."""
        free = [p for p, held in enumerate(self.logical_ids) if p not in used and (held < 0 or held not in wanted)]
        return sorted(free, key=lambda p: self.logical_ids[p] >= 0)

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in _tensors(self.layer).values())


def _kind(layer: ExpertLayer) -> dict[str, object]:
    """All but the tensors: sizes and form."""
    return {
        name: value
        for name, value in _stored(layer).items()
        if value is not None and not isinstance(value, torch.Tensor)
    }


def _tensors(layer: ExpertLayer) -> dict[str, torch.Tensor]:
    """What a layer stores, by name; every tensor's first axis is the expert."""
    return {name: value for name, value in _stored(layer).items() if isinstance(value, torch.Tensor)}


def _stored(layer: ExpertLayer) -> dict[str, object]:
    if layer.packed is None:
        return {str(i): value for i, value in enumerate(layer.natural)}
    return {field.name: getattr(layer.packed, field.name) for field in dataclasses.fields(layer.packed)}
