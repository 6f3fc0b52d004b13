"""When the experts should be placed anew, and by which loads. Pure: the Conductor gives it reports and a clock.

`LoadBook` turns what members count (rows per slot since a placement came into force) into loads per logical expert,
window by window, whatever placement they were counted under. `Rebalancer` closes a window when it has rows enough to
tell proportions from chance, holds the placement in force against the load model, and asks for another one where the
hottest ranks cost more than the limit, or where a death took copies that nobody has replaced. The plan itself is
`experts/eplb.py`'s. Idea: the load windows of EPLB."""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..config import RebalanceConfig
from ..experts.eplb import EplbConfig, Plan, blend, capacity, predict
from ..experts.placing import plan_for_members
from ..router.epoch import Epoch
from ..router.placement import Placement
from ..router.status import ExpertRows

FloatArray = npt.NDArray[np.float64]
_KNOWN_PLACEMENTS = 8  # a report may be about a placement that was in force a moment ago


class LoadBook:
    """Rows of every logical expert, [num_layers, num_logical], in the window that is open."""

    def __init__(self, num_layers: int, num_logical: int) -> None:
        self.window: FloatArray = np.zeros((num_layers, num_logical))
        self.history: FloatArray | None = None  # moving average of closed windows
        self._tables: OrderedDict[int, tuple[Placement, dict[str, int]]] = OrderedDict()
        self._counted: dict[tuple[str, int], npt.NDArray[np.int64]] = {}  # (member, version) -> its last report

    def learn(self, epoch: Epoch) -> None:
        """The placement that reports of this version are about, and who has which ep_rank in it."""
        ranks = {epoch.members[rank].member_id: ep_rank for ep_rank, rank in enumerate(epoch.expert_ranks)}
        self._tables[epoch.placement_version] = (epoch.placement, ranks)
        while len(self._tables) > _KNOWN_PLACEMENTS:
            self._tables.popitem(last=False)
        self._counted = {key: rows for key, rows in self._counted.items() if key[1] in self._tables}

    def take(self, report: ExpertRows) -> None:
        """Add what is new in a report. One about an unknown placement, or of another shape, says nothing."""
        placement, ranks = self._tables.get(report.placement_version, (None, {}))
        ep_rank = ranks.get(report.name)
        if (
            placement is None
            or ep_rank is None
            or report.rows.shape != (placement.num_layers, placement.slots_per_rank)
        ):
            return
        key = (report.name, report.placement_version)
        before = self._counted.get(key)
        new = report.rows - before if before is not None and (report.rows >= before).all() else report.rows
        self._counted[key] = report.rows
        slots = placement.slots_per_rank
        table = placement.physical_to_logical.numpy()[:, ep_rank * slots : (ep_rank + 1) * slots]
        layers, held = (table >= 0).nonzero()
        np.add.at(self.window, (layers, table[layers, held]), new[layers, held])

    def close_window(self) -> FloatArray:
        """The loads to place by: this window blended into those before it."""
        self.history = blend(self.window, self.history)
        self.window = np.zeros_like(self.window)
        return self.history


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A placement is wanted: why, and by which loads."""

    reason: str
    loads: FloatArray
    min_gain: float  # below it the plan is not worth its copies; 0 = in any case


class Rebalancer:
    """Looked at with every report; at most one wish is worked on at a time (the caller's business)."""

    def __init__(self, config: RebalanceConfig, eplb: EplbConfig, book: LoadBook) -> None:
        self._config, self._eplb, self._book = config, eplb, book
        self._looked_at = self._changed_at = 0.0

    def changed(self, now: float) -> None:
        """Another placement is in force: its windows begin now."""
        self._changed_at = now

    def look(self, epoch: Epoch, now: float, *, asked: str = "") -> Wish | None:
        """A wish, or None: too early, too few rows, or nothing wrong. `asked` says why somebody wants one at once."""
        placement = epoch.placement
        if not placement.moe_layers or placement.ep_size < 2:
            return None
        if asked:
            return Wish(reason=asked, loads=self._loads(placement), min_gain=1.0)
        config = self._config
        if not config.enabled or now - self._changed_at < config.interval_s:
            return None
        missing = missing_copies(placement, self._eplb)
        if missing:
            return Wish(reason=f"{missing} redundant copies are missing", loads=self._loads(placement), min_gain=0.0)
        if self._book.window.sum() < self._rows_wanted(placement):
            return None
        loads = self._book.close_window()
        balance = predict(placement, loads)
        if balance.max_over_mean <= config.skew:
            return None
        return Wish(reason=f"max / mean {balance.max_over_mean:.2f}", loads=loads, min_gain=config.min_gain)

    def _loads(self, placement: Placement) -> FloatArray:
        if self._book.window.sum() >= self._rows_wanted(placement):
            return self._book.close_window()
        return np.ones_like(self._book.window) if self._book.history is None else self._book.history

    def _rows_wanted(self, placement: Placement) -> float:
        return self._config.rows_per_expert * placement.num_logical_experts * len(placement.moe_layers)


def answer(wish: Wish, epoch: Epoch, config: RebalanceConfig, eplb: EplbConfig, version: int) -> Plan:
    """The plan for a wish; seconds of work for a large model, so not in an event loop's thread."""
    bounded = EplbConfig(
        num_redundant=eplb.num_redundant,
        min_copies=eplb.min_copies,
        max_slots_per_rank=eplb.max_slots_per_rank,
        max_moves=config.max_moves,
        tolerance=eplb.tolerance,
        min_gain=eplb.min_gain,
    )
    experts = tuple(epoch.members[rank] for rank in epoch.expert_ranks)
    return plan_for_members(wish.loads, experts, bounded, version=version, before=epoch)


def missing_copies(placement: Placement, eplb: EplbConfig) -> int:
    """Copies that these ranks could hold and do not, over all layers."""
    _, num_copies, _ = capacity(placement.num_logical_experts, placement.ep_size, eplb)
    held = (placement.physical_to_logical.numpy()[list(placement.moe_layers)] >= 0).sum(axis=1)
    return int(np.maximum(num_copies - held, 0).sum())
