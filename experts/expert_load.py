"""What a member that owns experts reports of its load: rows, how much of its time they took, what it holds.

Time comes from two sides: a step on the CPU measures its products by itself, a GPU's kernels note theirs in device
memory (`kernels/expert_work.py`). Waiting in lock-step is in neither."""

from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..router.epoch import Epoch, Member
from ..router.status import ExpertRows


class LoadedMesh(Protocol):
    """What is asked of `router.mesh.ClusterMesh`."""

    member: Member

    @property
    def epoch(self) -> Epoch | None: ...

    def load(self) -> tuple[int, npt.NDArray[np.int64]]: ...


class BusyExperts(Protocol):
    """What is asked of `LocalExpertMLP`."""

    @property
    def resident_bytes(self) -> int: ...

    def busy_s(self) -> float: ...


class ExpertLoad:
    """Windows from one `read` to the next."""

    def __init__(self, mesh: LoadedMesh, experts: BusyExperts, clock: Callable[[], float] = monotonic) -> None:
        self._mesh, self._experts, self._clock = mesh, experts, clock
        self._version, self._rows, self._rows_before = 0, 0, 0
        self._read_at, self._device_s = clock(), experts.busy_s()
        self.busy_s = 0.0  # in the last window

    def rows(self) -> ExpertRows | None:
        """What was asked of each slot, for the placement by load."""
        version, rows = self._mesh.load()
        return ExpertRows(name=self._mesh.member.member_id, placement_version=version, rows=rows) if version else None

    def read(self, host_s: float) -> dict[str, Any]:
        """Fields of ProcessStatus; `host_s` = time that steps measured on the host since the last call."""
        now, device_s = self._clock(), self._experts.busy_s()
        elapsed, self._read_at = max(now - self._read_at, 1e-3), now
        self.busy_s, self._device_s = host_s + device_s - self._device_s, device_s
        version, rows = self._mesh.load()
        if version != self._version:  # the mesh counts anew in each placement version
            self._rows_before, self._version = self._rows_before + self._rows, version
        self._rows = int(rows.sum())
        return {
            "num_rows": self._rows_before + self._rows,
            "busy_fraction": round(min(1.0, self.busy_s / elapsed), 4),
            "num_physical_experts": self._num_held(),
            "weight_bytes": self._experts.resident_bytes,
        }

    def _num_held(self) -> int:
        epoch = self._mesh.epoch
        if epoch is None:
            return 0
        ep_rank = epoch.expert_ranks.index(epoch.rank_of(self._mesh.member.member_id))
        held = [epoch.placement.local_slots(layer, ep_rank) for layer in epoch.placement.moe_layers]
        return sum(int((layer >= 0).sum()) for layer in held)
