"""The expert product of one shard: rows in, one unweighted row per (row, expert) out.

On a GPU that the kernels serve, `device_experts.py` holds the experts and multiplies in a few launches without a host
sync. Everywhere else, here: pairs are sorted by slot, every expert with rows gets a segment of at least `min_rows`
rows (padding repeats a row and is dropped), then w13, silu_mul, w2. Only experts that have rows are touched: a
segmented loop over them, or, where nearly all local experts have few rows each (decode of a small model), one batched
product over all, which saves the loop. Both give the same bits: a pair's result depends on its row and its expert,
not on the other rows, their order, the capacity or the number of local experts (`numerics.py`). There is never a loop
over tokens. Planned with NumPy: a decode step's indices are a few hundred numbers, where a torch call costs more than
the work."""

import logging
from dataclasses import dataclass
from functools import partial
from time import perf_counter_ns
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..checkpoint import Checkpoint, ProgressCallback, ProgressMeter
from ..errors import CheckpointError, EpochError
from ..kernels.expert_layer import why_no_kernels
from ..kernels.expert_work import ExpertWork, note_in_torch
from ..numerics import MAX_ROWS, Numerics, select_numerics, silu_mul
from ..router.placement import Placement
from ..startup_phases import StartupPhases
from .device_experts import DeviceExperts, PlacedExperts, expected_pairs
from .truth import ExpertTruth, Truths
from .weights import LayerExperts, expert_bytes_on_disk, expert_shapes, load_layer

logger = logging.getLogger(__name__)
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class ResidentPlacement:
    """What this rank holds under one placement version."""

    version: int
    ep_size: int
    layers: dict[int, LayerExperts | PlacedExperts]  # by layer id, MoE layers only


class CopySource(Protocol):
    """Other processes' copies (`copies.PeerCopies`)."""

    def fetch(self, layer_id: int, logical: int, w13: torch.Tensor, w2: torch.Tensor) -> ExpertTruth | None: ...

    def release(self) -> None: ...


class LocalExpertMLP:
    """`LocalExperts` of router/contracts.py. `set_placement` may run in a background thread; the rest in one."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        numerics: Numerics | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        progress: ProgressCallback | None = None,
        phases: StartupPhases | None = None,
    ) -> None:
        self.checkpoint, self.dtype, self.device, self.progress = checkpoint, dtype, device, progress
        self.phases = phases or StartupPhases()
        shapes = expert_shapes(checkpoint.config)
        self.numerics = numerics or select_numerics(
            batch_invariant=torch.device(device).type == "cpu",
            linear_shapes=shapes,
            batched_shapes=shapes,
            device=device,
        )
        self._resident: dict[int, ResidentPlacement] = {}
        self._current: ResidentPlacement | None = None
        self.truths = Truths(checkpoint, self.numerics, dtype)
        self._peers: CopySource | None = None
        self.num_from_peers = 0
        self._on_device = _experts_on_device(checkpoint, dtype, torch.device(device))
        # Of a GPU; a step on the CPU counts for itself.
        self._work = self._on_device.work if self._on_device else ExpertWork(checkpoint.config.num_layers, _CPU)

    @property
    def capturable(self) -> bool:
        """`forward` with slot ids on the device neither syncs nor changes its launches: a CUDA graph may hold it."""
        return self._on_device is not None

    @property
    def graph_version(self) -> int:
        """Changes when CUDA graphs captured with `forward` in them hold no longer."""
        return 0 if self._on_device is None else self._on_device.graph_version

    def busy_s(self) -> float:
        """Seconds in which this process's GPU computed rows, since the start. From any thread."""
        return self._work.busy_s()

    def rows_per_slot(self, version: int) -> npt.NDArray[np.int64]:
        """[num_layers, num_slots] that this process's GPU computed under this placement version, zeros where it is not
        in use there. From any thread."""
        made = self._resident.get(version)
        layers = {} if made is None else made.layers
        if self._on_device is not None:
            return self._on_device.rows_per_slot(_placed(layers), version)
        width = max((len(experts.logical_ids) for experts in layers.values()), default=0)
        return self._work.rows(version)[:, :width]

    def compile_ahead(self) -> None:
        """Whatever a step may need of the kernels, once experts are in use. Blocks; from any thread, beside steps."""
        if self._on_device is not None:
            self._on_device.compile_ahead()

    def set_placement(self, placement: Placement, ep_rank: int) -> None:
        if placement.version in self._resident:
            return
        wanted = {
            layer_id: _held(placement.local_slots(layer_id, ep_rank).tolist())
            for layer_id in self.checkpoint.config.moe_layer_ids
        }
        total = sum(
            sum(i >= 0 for i in ids) * expert_bytes_on_disk(self.checkpoint, layer_id)
            for layer_id, ids in wanted.items()
        )
        meter = ProgressMeter(f"experts of ep_rank {ep_rank}", total, self.progress)
        with self.phases.phase("experts"):
            layers = {layer_id: self._resident_or_loaded(layer_id, ids, meter) for layer_id, ids in wanted.items()}
        self.release_peers()
        by_peers = f", {self.num_from_peers} experts by peers" if self.num_from_peers else ""
        self.phases.note("experts", meter.finish().summary + by_peers)
        made = ResidentPlacement(placement.version, placement.ep_size, layers)
        self._resident[placement.version] = made
        if self._current is None:
            self._use(made)

    def use_placement(self, version: int) -> None:
        made = self._resident.get(version)
        if made is None:
            raise EpochError(
                f"placement {version} is not resident here (resident: {sorted(self._resident)}); "
                "prepare it with set_placement before the epoch is entered"
            )
        self._use(made)
        for old in [v for v in self._resident if v < version]:
            del self._resident[old]

    @property
    def resident_bytes(self) -> int:
        """Bytes of all resident experts, each tensor once; on a GPU free places too."""
        held = [experts for resident in self._resident.values() for experts in resident.layers.values()]
        pools = {id(e.pool): e.pool for e in held if isinstance(e, PlacedExperts)}
        tensors = {t.data_ptr(): t for e in held if isinstance(e, LayerExperts) for t in (e.w13, e.w2)}
        return sum(p.num_bytes for p in pools.values()) + sum(t.nbytes for t in tensors.values())

    @torch.inference_mode()
    def forward(self, layer_id: int, rows: torch.Tensor, slot_ids: torch.Tensor) -> torch.Tensor:
        assert self._current is not None, "forward before any set_placement"
        experts = self._current.layers[layer_id]
        if isinstance(experts, PlacedExperts):
            return self._device_rows(layer_id, rows, slot_ids)
        if not rows.is_cuda:
            return self._host_rows(experts, rows, slot_ids)
        slot_ids = slot_ids.cpu()  # waits until the rows are there
        started = perf_counter_ns()
        products = self._host_rows(experts, rows, slot_ids)
        torch.cuda.current_stream(rows.device).synchronize()
        note_in_torch(self._work.of(layer_id), slot_ids, perf_counter_ns() - started)
        return products

    @torch.inference_mode()
    def _host_rows(self, experts: LayerExperts, rows: torch.Tensor, slot_ids: torch.Tensor) -> torch.Tensor:
        plan = plan_segments(slot_ids.cpu().numpy(), experts.w13.shape[0], self.numerics.min_rows)
        if plan.num_pairs == 0:
            return rows.new_empty(0, rows.shape[1])
        x = rows.index_select(0, torch.from_numpy(plan.source_rows).to(rows.device))
        if plan.capacity:
            x = x.view(-1, plan.capacity, x.shape[1])  # [num_slots, capacity, hidden]
            hidden = silu_mul(self.numerics.batched_linear(x, experts.w13))
            out = self.numerics.batched_linear(hidden, experts.w2).view(-1, rows.shape[1])
        else:
            hidden = silu_mul(_segmented_linear(x, experts.w13_t, plan))
            out = _segmented_linear(hidden, experts.w2_t, plan)
        return out.index_select(0, torch.from_numpy(plan.result_rows).to(rows.device))

    def _device_rows(self, layer_id: int, rows: torch.Tensor, slot_ids: torch.Tensor) -> torch.Tensor:
        assert self._on_device is not None
        assert self._current is not None
        pairs = expected_pairs(slot_ids.shape[0], slot_ids.shape[1], self._current.ep_size)
        if slot_ids.device == rows.device:
            return self._on_device.rows(layer_id, rows, slot_ids, expected_pairs=pairs)
        wanted = (slot_ids.flatten() >= 0).nonzero().flatten()  # ids on the host: so is the number of pairs
        out = self._on_device.rows(layer_id, rows, slot_ids.to(rows.device), expected_pairs=pairs)
        return out.flatten(0, 1).index_select(0, wanted.to(rows.device))

    def _use(self, made: ResidentPlacement) -> None:
        self._current = made
        if self._on_device is not None:
            self._on_device.use(_placed(made.layers), made.version)
        else:
            self._work.count_for(made.version)

    def _resident_or_loaded(
        self, layer_id: int, ids: tuple[int, ...], meter: ProgressMeter
    ) -> LayerExperts | PlacedExperts:
        """A layer whose slots did not change shares the older placement's tensors."""
        resident = [r.layers[layer_id] for r in list(self._resident.values())]
        same = next((e for e in resident if e.logical_ids == ids), None)
        if same is not None:
            return same
        if self._on_device is not None:
            older = [e for e in resident if isinstance(e, PlacedExperts)]
            return self._on_device.place(layer_id, ids, older, meter)
        on_host = [e for e in resident if isinstance(e, LayerExperts)]
        made = load_layer(
            self.checkpoint,
            layer_id,
            ids,
            dtype=self.dtype,
            device=self.device,
            resident=on_host,
            fetch=partial(self.fetch_from_peer, layer_id),
            meter=meter,
        )
        self._verify(layer_id, made)
        return made

    def take_from(self, peers: CopySource) -> None:
        """They are asked before the disk, for experts in host memory."""
        self._peers = peers

    def release_peers(self) -> None:
        if self._peers is not None:
            self._peers.release()

    def fetch_from_peer(self, layer_id: int, logical: int, w13: torch.Tensor, w2: torch.Tensor) -> bool:
        """Whether another process gave this expert. The caller holds it against its truth."""
        truth = self._peers.fetch(layer_id, logical, w13, w2) if self._peers and w13.device.type == "cpu" else None
        if truth is None:
            return False
        self.truths.learn(layer_id, logical, truth)
        self.num_from_peers += 1
        return True

    def resident_layers(self) -> list[tuple[int, LayerExperts]]:
        """What lies in host memory, layer by layer, of all resident placements."""
        held = [pair for resident in list(self._resident.values()) for pair in resident.layers.items()]
        return [(layer_id, experts) for layer_id, experts in held if isinstance(experts, LayerExperts)]

    def _verify(self, layer_id: int, made: LayerExperts) -> None:
        """Every slot against its truth, bytes and golden rows, before anything is computed with it. What does not fit
        is read once more: CheckpointError where that does not help."""
        if made.w13.device.type != "cpu":
            return
        slots = [slot for slot, logical in enumerate(made.logical_ids) if logical >= 0]
        for slot in (bad := self._unlike_truth(layer_id, made, slots)):
            logical = made.logical_ids[slot]
            logger.error("expert %d of layer %d came damaged into slot %d: read again", logical, layer_id, slot)
            self.truths.forget(layer_id, logical)  # either reading may have been the damaged one
            for part, again in zip((made.w13[slot], made.w2[slot]), self.truths.read(layer_id, logical), strict=True):
                part.copy_(again)
        for slot in self._unlike_truth(layer_id, made, bad):
            raise CheckpointError(
                f"expert {made.logical_ids[slot]} of layer {layer_id} is not what another reading of the checkpoint "
                "gives: its bytes are damaged on their way, or this machine computes wrong; replace it"
            )

    def _unlike_truth(self, layer_id: int, made: LayerExperts, slots: list[int]) -> list[int]:
        """All golden rows of a layer in one product: it runs beside steps, and calls by the slot would hold them up."""
        if not slots:
            return []
        golden, num = self.truths.rows, len(self.truths.rows)
        slot_ids = torch.tensor(slots, dtype=torch.int32).repeat_interleave(num).unsqueeze(1)
        products = self._host_rows(made, golden.repeat(len(slots), 1), slot_ids).split(num)
        return [slot for slot, its in zip(slots, products, strict=True) if not self._is_true(layer_id, made, slot, its)]

    def _is_true(self, layer_id: int, made: LayerExperts, slot: int, products: torch.Tensor) -> bool:
        truths, logical = self.truths, made.logical_ids[slot]
        fits = truths.of(layer_id, logical).fits(made.w13[slot], made.w2[slot])
        return fits and truths.is_golden(layer_id, logical, products)


def _experts_on_device(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> DeviceExperts | None:
    """Where the kernels run; None elsewhere, said in the log if that was a GPU."""
    config = checkpoint.config
    if device.type != "cuda" or not config.moe_layer_ids:
        return None
    width, hidden = config.moe_intermediate_size, config.hidden_size
    one = torch.empty((), dtype=dtype, device=device)  # sizes alone: every expert is a view of one number
    reason = why_no_kernels(one.expand(1, 2 * width, hidden), one.expand(1, hidden, width))
    if reason is None:
        return DeviceExperts(checkpoint, dtype=dtype, device=device)
    logger.warning("experts run in plain torch, much slower than the kernels and with a host sync: %s", reason)
    return None


def _placed(layers: dict[int, LayerExperts | PlacedExperts]) -> dict[int, PlacedExperts]:
    return {layer_id: experts for layer_id, experts in layers.items() if isinstance(experts, PlacedExperts)}


def _held(ids: list[int]) -> tuple[int, ...]:
    """Without the empty slots at the end: fewer shards mean wider tables, and what is resident already serves them."""
    used = len(ids)
    while used > 1 and ids[used - 1] < 0:
        used -= 1
    return tuple(ids[:used])


@dataclass(frozen=True, slots=True, eq=False)
class SegmentPlan:
    """Pairs in slot order, padded. `capacity` > 0: one batched product over all slots, each with so many rows."""

    num_pairs: int
    capacity: int
    source_rows: np.ndarray  # [num_padded] int64, which input row each padded row copies
    result_rows: np.ndarray  # [num_pairs] int64, padded row of each pair in (row, k) order
    segment_slots: list[int]  # expert of each segment
    segment_sizes: list[int]  # rows of each segment, min_rows..MAX_ROWS; sums to num_padded


def plan_segments(slot_ids: np.ndarray, num_slots: int, min_rows: int) -> SegmentPlan:
    """slot_ids [R, top_k] int32, -1 none.

    One batched product where no expert has many rows and at least three quarters have some: what it wastes on padding
    and on empty slots is then less than a loop's calls cost."""
    flat = slot_ids.reshape(-1)
    pairs = (flat >= 0).nonzero()[0]
    slots = flat[pairs]
    counts = np.bincount(slots, minlength=num_slots)  # pairs of each slot
    active = counts.nonzero()[0]
    most = int(counts.max()) if len(pairs) else 0
    capacity = 0
    segment_slots: list[int] = []
    segment_sizes: list[int] = []
    padded = np.where(counts > 0, np.maximum(counts, min_rows), 0)
    if most <= 2 * min_rows + 8 and 4 * len(active) >= 3 * num_slots:
        capacity = max(most, min_rows)
        starts = np.arange(num_slots) * capacity
        num_padded = num_slots * capacity
    else:
        if most > MAX_ROWS:  # the last piece of a long segment needs min_rows too
            rest = counts % MAX_ROWS
            padded = np.where((counts > MAX_ROWS) & (rest > 0) & (rest < min_rows), counts - rest + min_rows, padded)
        segment_slots, segment_sizes = _pieces(active.tolist(), padded[active].tolist())
        starts = np.cumsum(padded) - padded
        num_padded = int(padded.sum())
    order = np.argsort(slots, kind="stable")
    ordered = slots[order]
    first = np.cumsum(counts) - counts
    positions = starts[ordered] + np.arange(len(pairs)) - first[ordered]  # padded row of each pair in slot order
    source_rows = np.zeros(num_padded, dtype=np.int64)
    source_rows[positions] = pairs[order] // slot_ids.shape[1]
    result_rows = np.empty(len(pairs), dtype=np.int64)
    result_rows[order] = positions
    return SegmentPlan(len(pairs), capacity, source_rows, result_rows, segment_slots, segment_sizes)


def _pieces(slots: list[int], sizes: list[int]) -> tuple[list[int], list[int]]:
    """Cut segments into pieces of at most MAX_ROWS rows."""
    if max(sizes, default=0) <= MAX_ROWS:
        return slots, sizes
    cut = [(slot, min(MAX_ROWS, size - done)) for slot, size in zip(slots, sizes) for done in range(0, size, MAX_ROWS)]
    return [slot for slot, _ in cut], [size for _, size in cut]


def _segmented_linear(x: torch.Tensor, w: tuple[torch.Tensor, ...], plan: SegmentPlan) -> torch.Tensor:
    """x [num_padded, K], w by slot [K, N] -> [num_padded, N], each segment by its own expert."""
    out = x.new_empty(x.shape[0], w[0].shape[1])
    for slot, rows, result in zip(
        plan.segment_slots, torch.split(x, plan.segment_sizes), torch.split(out, plan.segment_sizes)
    ):
        torch.mm(rows, w[slot], out=result)
    return out
