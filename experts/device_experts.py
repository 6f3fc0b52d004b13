"""The experts of one rank in a GPU's memory: what `mlp.py` holds and calls where the kernels run.

A layer's experts lie in a pool of places (`kernels/expert_pool.py`), a few more than the rank has slots. A new
placement loads what is missing into places that no version uses, while older versions serve; entering it copies the
new table slot -> place into the one that the kernels read, so no address changes and captured graphs stay good. Only a
placement that exchanges more experts of a layer than places are free gets a new pool; `graph_version` then changes,
and graphs captured before it hold no longer.

Experts are read, packed and put in place by the hundred: one at a time, the 6144 of Qwen3-30B are 6144 times some fifty
small calls, which take longer than their bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..checkpoint import Checkpoint, ProgressMeter
from ..kernels.compile_ahead import compile_ahead, kernels_of
from ..kernels.expert_layer import ExpertLayer
from ..kernels.expert_pool import ExpertPool
from ..kernels.expert_work import ExpertWork
from ..kernels.jit import architecture
from .quantized_weights import are_quantized, load_quantized_layer
from .weights import expert_bytes_on_disk, load_stack

LOAD_BYTES = 512 << 20  # read and packed at once, on their way into the pool: beside it a load needs little memory

NUM_SPARE = 2  # places of each layer beyond its slots


@dataclass(frozen=True, slots=True, eq=False)
class PlacedExperts:
    """One layer under one placement."""

    logical_ids: tuple[int, ...]  # expert in each slot, -1 = empty
    pool: ExpertPool
    places: tuple[int, ...]  # of each slot in the pool, -1 = empty slot
    place_of_slot: torch.Tensor  # the same, [num_slots] int32 on the device


class DeviceExperts:
    """`place` may run in a background thread; `use` and `rows` in the engine's."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_spare: int = NUM_SPARE,
        kernels: str = "cuda",
    ) -> None:
        """`num_spare` places of each layer beyond its slots: so many experts of a layer may change at once."""
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self.num_spare, self.kernels = num_spare, kernels
        self.graph_version = 0
        self.work = ExpertWork(checkpoint.config.num_layers, device)
        self._maps: dict[int, torch.Tensor] = {}  # by layer: the table that the kernels read, slot -> place
        self._used: Mapping[int, PlacedExperts] = {}
        on_gpu = device.type == "cuda"
        self._loading = torch.cuda.Stream(device) if on_gpu else None
        self._entered = torch.cuda.Event() if on_gpu else None  # everything before it read older versions

    @torch.inference_mode()  # as all of it, so that what one thread made another may write to
    def place(
        self,
        layer_id: int,
        logical_ids: tuple[int, ...],
        resident: Sequence[PlacedExperts],
        meter: ProgressMeter | None = None,
    ) -> PlacedExperts:
        """Make these experts resident beside all of `resident` and return where they are."""
        if self._loading is None or self._entered is None:
            return self._place(layer_id, logical_ids, resident, meter)
        self._loading.wait_event(self._entered)
        with torch.cuda.stream(self._loading):
            placed = self._place(layer_id, logical_ids, resident, meter)
        self._loading.synchronize()
        return placed

    @torch.inference_mode()
    def use(self, layers: Mapping[int, PlacedExperts], version: int = 0) -> None:
        """From here on `rows` reads these, and counts what it computes for this placement version. Enqueued on the
        current stream; nothing waits."""
        for layer_id, placed in layers.items():
            before, table = self._used.get(layer_id), self._maps.get(layer_id)
            num_slots = placed.place_of_slot.numel()
            if before is None or table is None or before.pool is not placed.pool or table.numel() < num_slots:
                self._maps[layer_id] = placed.place_of_slot.clone()
                self.graph_version += before is not None
                continue
            table[:num_slots].copy_(placed.place_of_slot)
            table[num_slots:].fill_(-1)
        self.work.count_for(version)
        if self._entered is not None:
            if not self._used:
                torch.cuda.empty_cache()  # what the first load needed on its way, for everybody else
            self._entered.record()
        self._used = dict(layers)

    def rows(
        self, layer_id: int, rows: torch.Tensor, slot_ids: torch.Tensor, *, expected_pairs: float | None = None
    ) -> torch.Tensor:
        """rows [R, hidden], slot_ids [R, top_k] int32 on the device -> [R, top_k, hidden]; pairs of -1 hold nothing of
        meaning. No host sync; capturable after one call with the same R."""
        layer, places, work = self._used[layer_id].pool.layer, self._maps[layer_id], self.work.of(layer_id)
        return layer.rows(rows, slot_ids, expert_map=places, expected_pairs=expected_pairs, work=work)

    def rows_per_slot(self, layers: Mapping[int, PlacedExperts], version: int) -> npt.NDArray[np.int64]:
        """[num_layers, num_slots] computed under `version`, which is of these layers. Slots with the same expert share
        a place: the first of them has the rows of all."""
        counted = self.work.rows(version)
        width = max((len(placed.places) for placed in layers.values()), default=0)
        rows = np.zeros((counted.shape[0], width), dtype=np.int64)
        for layer_id, placed in layers.items():
            for place in {p for p in placed.places if p >= 0}:
                rows[layer_id, placed.places.index(place)] = counted[layer_id, place]
        return rows

    def compile_ahead(self) -> None:
        """Every plan of the products, so that no step waits for NVRTC. From any thread, once experts are in use."""
        layer = next((placed.pool.layer for placed in self._used.values()), None)
        if layer is not None:
            index = self.device.index if self.device.index is not None else torch.cuda.current_device()
            compile_ahead(kernels_of(layer, self.checkpoint.config.top_k), architecture(index))

    def _place(
        self,
        layer_id: int,
        logical_ids: tuple[int, ...],
        resident: Sequence[PlacedExperts],
        meter: ProgressMeter | None,
    ) -> PlacedExperts:
        wanted = sorted({i for i in logical_ids if i >= 0})
        pool, free = self._pool_with_room(wanted, resident)
        if pool is None and resident:
            pool = ExpertPool(resident[-1].pool.layer, len(logical_ids) + self.num_spare)
            free = pool.free_places((), wanted)
        to_load = []
        for logical in wanted:
            older = next((r.pool for r in resident if logical in r.pool.logical_ids), None)
            if older is None:
                to_load.append(logical)
            elif pool is not None and logical not in pool.logical_ids:
                pool.put(free.pop(0), logical, older.layer, older.logical_ids.index(logical))
        at_once = max(1, LOAD_BYTES // expert_bytes_on_disk(self.checkpoint, layer_id))
        for begin in range(0, len(to_load), at_once):
            part = to_load[begin : begin + at_once]
            made = self._load(layer_id, part, meter)
            if pool is None:
                pool = ExpertPool(made, len(logical_ids) + self.num_spare)
                free = pool.free_places((), wanted)
            pool.put_all(free[: len(part)], part, made)
            free = free[len(part) :]
        if pool is None:  # nothing is wanted here: the form of any expert
            pool = ExpertPool(self._load(layer_id, [0], meter), len(logical_ids) + self.num_spare)
        places = tuple(pool.logical_ids.index(i) if i >= 0 else -1 for i in logical_ids)
        return PlacedExperts(logical_ids, pool, places, torch.tensor(places, dtype=torch.int32, device=self.device))

    def _pool_with_room(
        self, wanted: Sequence[int], resident: Sequence[PlacedExperts]
    ) -> tuple[ExpertPool | None, list[int]]:
        """A resident pool (newest first) that can take what it lacks without touching what any version reads."""
        for placed in reversed(resident):
            pool = placed.pool
            read = {i for r in resident if r.pool is pool for i in r.logical_ids if i >= 0}
            used = {p for p, held in enumerate(pool.logical_ids) if held in read}
            free = pool.free_places(used, wanted)
            if len([i for i in wanted if i not in pool.logical_ids]) <= len(free):
                return pool, free
        return None, []

    def _load(self, layer_id: int, logical_ids: Sequence[int], meter: ProgressMeter | None) -> ExpertLayer:
        if are_quantized(self.checkpoint, layer_id):
            arguments = load_quantized_layer(self.checkpoint, layer_id, logical_ids, device=self.device, meter=meter)
            return ExpertLayer(*arguments, kernels=self.kernels)  # type: ignore[arg-type]
        w13, w2 = load_stack(self.checkpoint, layer_id, logical_ids, dtype=self.dtype, device=self.device, meter=meter)
        return ExpertLayer(w13, w2, kernels=self.kernels)


def expected_pairs(num_rows: int, top_k: int, ep_size: int) -> float:
    """Pairs among rows that this rank was sent because at least one of their experts is here, routing being even."""
    here = 1 / ep_size
    return num_rows * top_k * here / (1 - (1 - here) ** top_k)
