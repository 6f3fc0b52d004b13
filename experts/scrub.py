"""Expert weights at rest: checked against their truth again and again, damage named and repaired.

One low-priority thread walks through every resident expert and compares the bytes with `truth.py`'s checksums. It takes
at most `max_share` of a core, and as much less as a whole round within `period_s` needs; where the weights are too many
for both, the share wins and the round takes longer (`round_s` says how long). A damaged expert is overwritten in place
by another copy that fits its truth, in this process, else from a peer's memory, else from disk; a forward in progress
reads at worst what it would have read before. Every product since the expert's last clean check is suspect: the fault
says how many rows that are, and since when. An expert that cannot be repaired is reported, so that the shard is
drained.

Idea: the patrol scrub of ECC memory, for what ECC does not see or a machine does not have."""

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic, thread_time, time

import numpy as np
import numpy.typing as npt
import torch

from ..errors import CheckpointError
from .mlp import LocalExpertMLP
from .truth import ExpertTruth
from .weights import LayerExperts

_log = logging.getLogger(__name__)

CountRows = Callable[[], tuple[int, npt.NDArray[np.int64]]]  # as ClusterMesh.load
_KEPT_FAULTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFault:
    """Damage that was found in one copy of one expert. Times in seconds since 1970."""

    layer_id: int
    expert: int  # logical
    slot: int
    last_clean_at: float
    found_at: float
    num_rows: int  # computed with it between those two times, at least
    touched: bool  # whether it may have computed any
    repaired_from: str  # "memory", "peer", "disk", or "" where it could not be

    def __str__(self) -> str:
        seconds = self.found_at - self.last_clean_at
        repair = f"repaired from {self.repaired_from}" if self.repaired_from else "not repaired"
        return (
            f"expert {self.expert} of layer {self.layer_id} (slot {self.slot}) was damaged: {self.num_rows} rows "
            f"in the {seconds:.0f} s since it was last clean are suspect; {repair}"
        )


@dataclass(frozen=True, slots=True)
class _Cell:
    """One copy of one expert in memory."""

    layer_id: int
    slot: int
    logical: int
    experts: LayerExperts

    @property
    def key(self) -> tuple[int, int]:
        return self.experts.w13.data_ptr(), self.slot

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.experts.w13[self.slot], self.experts.w2[self.slot]


class Scrubber:
    """`start` and `stop`, or `check_all` for one round at full speed."""

    def __init__(
        self,
        experts: LocalExpertMLP,
        *,
        count_rows: CountRows | None = None,
        period_s: float = 60.0,
        max_share: float = 0.02,
        on_fault: Callable[[WeightFault], None] = lambda fault: None,
    ) -> None:
        self._experts, self._count_rows = experts, count_rows
        self._period_s, self._max_share, self._on_fault = period_s, max_share, on_fault
        self.faults: deque[WeightFault] = deque(maxlen=_KEPT_FAULTS)
        self.num_faults = 0
        self.num_rounds = 0
        self.round_s = 0.0  # that the last whole round took
        self.busy_s = 0.0  # in checks, since start
        self._clean: dict[tuple[int, int], tuple[float, int, int]] = {}  # cell -> (when, placement version, rows)
        self._asked_at: dict[int, float] = {}  # layer -> when `check_layer` was asked
        self._lock = threading.Lock()  # of a check and its repair
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="expert-scrub", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10.0)

    def check_layer(self, layer_id: int) -> bool:
        """One layer at once, in the caller's thread: its products look wrong. True where something was repaired. Asked
        again within a second it answers False: then the weights are not to blame."""
        now = monotonic()
        if now - self._asked_at.get(layer_id, -1.0) < 1.0:
            return False
        self._asked_at[layer_id] = now
        found = [self._check(cell) for cell in self._cells() if cell.layer_id == layer_id]
        return any(fault is not None and fault.repaired_from for fault in found)

    @property
    def summary(self) -> str:
        """For a status line; "" = nothing was found."""
        if not self.num_faults:
            return ""
        return f"{self.num_faults} damaged experts, the last: {self.faults[-1]}"

    @property
    def suspect_spans(self) -> tuple[tuple[float, float], ...]:
        """Times in which damaged weights were used, of the last faults; unix seconds."""
        return tuple((f.last_clean_at, f.found_at) for f in list(self.faults) if f.touched)

    def check_all(self) -> list[WeightFault]:
        """One round at full speed; what it found."""
        found = [self._check(cell) for cell in self._cells()]
        self.num_rounds += 1
        return [fault for fault in found if fault is not None]

    def _run(self) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # on Linux: of this thread
        while not self._stop.is_set():
            started = monotonic()
            cells = list(self._cells())
            self._clean = {cell.key: self._clean[cell.key] for cell in cells if cell.key in self._clean}
            for done, cell in enumerate(cells, start=1):
                before = thread_time()  # of the processor: a share of it is meant, not of the clock
                self._check(cell)
                took_s = thread_time() - before
                self.busy_s += took_s
                until_due_s = started + self._period_s * done / len(cells) - monotonic()
                pause_s = max(0.0, until_due_s, took_s * (1 / self._max_share - 1))
                if self._stop.wait(pause_s):
                    return
            if not cells and self._stop.wait(1.0):
                return
            self.num_rounds, self.round_s = self.num_rounds + 1, monotonic() - started

    def _cells(self) -> Iterator[_Cell]:
        """Every copy once, though placements share tensors."""
        seen = set()
        for layer_id, experts in self._experts.resident_layers():
            for slot, logical in enumerate(experts.logical_ids):
                cell = _Cell(layer_id, slot, logical, experts)
                if logical >= 0 and cell.key not in seen:
                    seen.add(cell.key)
                    yield cell

    def _check(self, cell: _Cell) -> WeightFault | None:
        with self._lock:
            return self._check_alone(cell)

    def _check_alone(self, cell: _Cell) -> WeightFault | None:
        version, num_rows = self._rows_of(cell)  # before the check: what comes during it counts next time
        now = time()
        if self._experts.truths.of(cell.layer_id, cell.logical).fits(*cell.parts):
            self._clean[cell.key] = (now, version, num_rows)
            return None
        last_clean_at, its_version, its_rows = self._clean.get(cell.key, (now, version, 0))
        fault = WeightFault(
            layer_id=cell.layer_id,
            expert=cell.logical,
            slot=cell.slot,
            last_clean_at=last_clean_at,
            found_at=now,
            num_rows=num_rows - its_rows if version == its_version else num_rows,
            touched=version != its_version or num_rows > its_rows,
            repaired_from=self._repair(cell),
        )
        self.num_faults += 1
        self.faults.append(fault)
        _log.error("%s", fault)
        self._on_fault(fault)
        return fault

    def _repair(self, cell: _Cell) -> str:
        truth = self._experts.truths.of(cell.layer_id, cell.logical)
        for other in self._cells():
            same = (other.layer_id, other.logical) == (cell.layer_id, cell.logical)
            if same and other.key != cell.key and truth.fits(*other.parts):
                return "memory" if self._overwrite(cell, *other.parts) else ""
        if self._fetch(cell, truth):
            return "peer"
        try:
            read = self._experts.truths.read(cell.layer_id, cell.logical)
        except CheckpointError as error:
            _log.error("expert %d of layer %d cannot be read again: %s", cell.logical, cell.layer_id, error)
            return ""
        return "disk" if truth.fits(*read) and self._overwrite(cell, *read) else ""

    def _fetch(self, cell: _Cell, truth: ExpertTruth) -> bool:
        """From another process, beside the damaged one: it is replaced by nothing but the expert's very bytes."""
        w13, w2 = self._experts.truths.empty()
        try:
            found = self._experts.fetch_from_peer(cell.layer_id, cell.logical, w13, w2)
        finally:
            self._experts.release_peers()
        return found and truth.fits(w13, w2) and self._overwrite(cell, w13, w2)

    def _overwrite(self, cell: _Cell, w13: torch.Tensor, w2: torch.Tensor) -> bool:
        """True when the memory then holds what was written; a stuck bit does not."""
        for part, good in zip(cell.parts, (w13, w2), strict=True):
            part.copy_(good)
        return self._experts.truths.of(cell.layer_id, cell.logical).fits(*cell.parts)

    def _rows_of(self, cell: _Cell) -> tuple[int, int]:
        """(placement version, rows that this slot has computed in it)."""
        if self._count_rows is None:
            return 0, 0
        version, rows = self._count_rows()
        inside = cell.layer_id < rows.shape[0] and cell.slot < rows.shape[1]
        return version, int(rows[cell.layer_id, cell.slot]) if inside else 0
