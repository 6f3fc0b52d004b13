"""Load windows and the present placement -> the next placement, with few moves. Pure; `relocate.py` moves the weights.

Why not pack from scratch: a balancer that forgets where experts are moves nearly all of them whenever the load drifts,
and every move is an expert's weights through a link that serving needs too. Here the present table is the start. What
must change (experts without a living copy, ranks that hold too much) is placed first and never bounded; lost redundancy
comes second; then every layer takes the steps that lower its hottest rank most per move (`eplb_search.py`), and the
layers share `max_moves` by gain. A copy that may stay keeps its rank, and its slot where the width allows.

Redundant copies go to hot experts. With one for every expert (`num_redundant >= num_logical`) each keeps two first, so
that any one death leaves a copy (`min_copies`). Copies of one expert are never on one rank, and where there are two
hosts on both.

The load model: a rank's load in a layer is the sum over its slots of load / copies; ranks work in lock-step, so a layer
lasts as long as its hottest rank and a step as long as the sum over layers. `Balance` is that prediction, to be held
against what is measured. Idea: redundant experts and load model of DeepSeek's EPLB; the search is local."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..errors import EpochError
from ..router.placement import Placement, uniform
from .eplb_search import Search, choose_steps

FloatArray = npt.NDArray[np.float64]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class EplbConfig:
    """What a placement may use. Counts are per layer, except `max_moves`."""

    num_redundant: int = 0  # copies beyond one of each expert
    min_copies: int = (
        0  # of every expert; 0 = as many as the spare copies make for all, 1 = all spare copies to hot ones
    )
    max_slots_per_rank: int = 0  # memory of a rank; 0 = what num_redundant asks for
    max_moves: int = -1  # optional moves of one plan, expert-layers; -1 = as many as help, 0 = only what must be
    tolerance: float = 0.01  # a layer with max / mean below 1 + tolerance is left alone
    min_gain: float = 0.0005  # a step must lower a layer's hottest rank by this part of the mean load


@dataclass(frozen=True, slots=True)
class Balance:
    """The load model of a placement. Time is in units of load: proportional to rows."""

    max_load: FloatArray  # [num_moe_layers] of the hottest rank
    mean_load: FloatArray  # [num_moe_layers]

    @property
    def total(self) -> float:
        """Predicted expert time of a step, in units of load."""
        return float(self.max_load.sum())

    @property
    def max_over_mean(self) -> float:
        """Predicted expert time of a step over that of a perfect placement."""
        total = float(self.mean_load.sum())
        return self.total / total if total > 0 else 1.0

    @property
    def worst_layer(self) -> float:
        busy = self.mean_load > 0
        return float((self.max_load[busy] / self.mean_load[busy]).max()) if busy.any() else 1.0


class Move(NamedTuple):
    """One expert of one layer into one slot. `from_physical` is a slot of the placement before, -1 = from disk."""

    layer_id: int
    logical_id: int
    to_physical: int
    from_physical: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    placement: Placement
    moves: tuple[Move, ...]
    num_forced: int  # of the moves: those without which the placement would not be valid
    missing: tuple[tuple[int, int], ...]  # (layer, logical) without a living copy before; requests wait for these
    before: Balance | None  # the placement before, None where it cannot serve (or was none)
    after: Balance

    @property
    def predicted_gain(self) -> float:
        """Expert time of a step before / after by the load model, on whatever ranks there are; 1.0 = no change."""
        if self.before is None or self.after.total <= 0:
            return 1.0
        return self.before.total / self.after.total


def plan(
    loads: npt.ArrayLike,  # [num_layers, num_logical]; rows of dense layers are ignored
    hosts: Sequence[str],  # of every ep_rank of the next placement
    config: EplbConfig,
    *,
    version: int = 1,
    present: Placement | None = None,
    ranks_before: Sequence[int] | None = None,  # ep_rank in `present` of every next ep_rank, -1 = a newcomer
    lost: Sequence[int] = (),  # ep_ranks of `present` that are dead; others that leave still give copies away
    moe_layers: Sequence[int] | None = None,  # of a first placement; later ones keep those of `present`
) -> Plan:
    """The next placement. A death, a join, a drain and a plain rebalance differ in `ranks_before` and `lost` only."""
    load = np.asarray(loads, dtype=np.float64)
    num_layers, num_logical = load.shape
    ep_size = len(hosts)
    if present is not None and (present.num_layers, present.num_logical_experts) != load.shape:
        raise EpochError(f"loads of shape {load.shape}, placement {present.version} has {present.num_layers} layers")
    if not np.isfinite(load).all() or (load < 0).any():
        raise EpochError("expert loads must be finite and not negative")
    slots, num_copies, min_copies = capacity(num_logical, ep_size, config)
    chosen = present.moe_layers if present is not None else range(num_layers) if moe_layers is None else moe_layers
    layers = np.asarray(tuple(chosen), dtype=np.int64)
    load = load[layers]
    mapping = list(ranks_before if ranks_before is not None else range(ep_size) if present is not None else [])
    kept = (
        _carry(present, layers, mapping)
        if present is not None
        else _first(len(layers), num_logical, hosts, num_copies - num_logical)
    )
    search = Search(load, kept, slots, _numbered(hosts), num_copies=num_copies, min_copies=min_copies)
    if present is None:
        search.forget_moves()  # every first copy comes from disk anyway: nothing to be near to
    search.make_valid()
    num_forced = int(search.num_moves.sum())
    budget = int(config.max_moves if config.max_moves >= 0 and present is not None else load.size * ep_size)
    table = search.table.copy()
    if budget > 0:
        search.restore_copies()
        search.balance(tolerance=config.tolerance, min_gain=config.min_gain)
        search.part_hosts()
        search.balance(tolerance=config.tolerance, min_gain=config.min_gain)
        table = choose_steps(table, search.history, budget)
    full = np.full((num_layers, ep_size * slots), -1, dtype=np.int32)
    full[layers] = table.reshape(len(layers), -1)
    placement = Placement(version, num_logical, ep_size, torch.from_numpy(full))
    moves, missing = _moves(placement, present, mapping, set(lost), hosts)
    return Plan(
        placement=placement,
        moves=moves,
        num_forced=num_forced if present is not None else len(moves),
        missing=missing,
        before=predict(present, loads) if present is not None and not missing else None,
        after=predict(placement, loads),
    )


def capacity(num_logical: int, ep_size: int, config: EplbConfig) -> tuple[int, int, int]:
    """(slots a rank, copies a layer, copies that each expert should have). EpochError if one of each does not fit."""
    if ep_size < 1:
        raise EpochError("no expert rank is left to hold a copy")
    wanted = min(num_logical + config.num_redundant, num_logical * ep_size)
    slots = -(-wanted // ep_size)
    if config.max_slots_per_rank:
        slots = min(slots, config.max_slots_per_rank)
    if slots * ep_size < num_logical:
        raise EpochError(
            f"{num_logical} experts do not fit into {ep_size} ranks of {slots} slots; "
            f"{min_shards(num_logical, config.max_slots_per_rank)} ranks are needed"
        )
    num_copies = min(wanted, slots * ep_size)
    for_all = num_copies // num_logical if num_logical else 1
    return slots, num_copies, min(for_all, config.min_copies) if config.min_copies else for_all


def min_shards(num_logical: int, max_slots_per_rank: int) -> int:
    """Fewest ranks that hold one copy of every expert."""
    return max(1, -(-num_logical // max_slots_per_rank)) if max_slots_per_rank else 1


def predict(placement: Placement, loads: npt.ArrayLike) -> Balance:
    """The load model of `placement` under `loads` [num_layers, num_logical]."""
    load = np.asarray(loads, dtype=np.float64)[list(placement.moe_layers)]
    table = placement.physical_to_logical.numpy()[list(placement.moe_layers)]
    counts = placement.logical_replica_count.numpy()[list(placement.moe_layers)]
    share = np.pad(load / np.maximum(counts, 1), ((0, 0), (0, 1)))  # the last column is what an empty slot (-1) reads
    ranks = np.take_along_axis(share, table.astype(np.int64) % share.shape[1], axis=1)
    ranks = ranks.reshape(len(table), placement.ep_size, -1).sum(axis=2)
    return Balance(ranks.max(axis=1), ranks.mean(axis=1))


def logical_loads(placement: Placement, rows_per_slot: npt.ArrayLike) -> FloatArray:
    """[num_layers, num_physical] rows of each slot, of all ranks -> [num_layers, num_logical] rows of each expert."""
    rows = np.asarray(rows_per_slot, dtype=np.float64)
    table = placement.physical_to_logical.numpy()
    loads = np.zeros((placement.num_layers, placement.num_logical_experts))
    layers, slots = (table >= 0).nonzero()
    np.add.at(loads, (layers, table[layers, slots]), rows[layers, slots])
    return loads


def blend(window: npt.ArrayLike, history: npt.ArrayLike | None, *, weight: float = 0.3) -> FloatArray:
    """Moving average of load windows: every layer's window is scaled to the history's total first, so a quiet window
    says as much about the proportions as a busy one. A layer without rows keeps its history."""
    now = np.asarray(window, dtype=np.float64)
    if history is None:
        return now
    past = np.asarray(history, dtype=np.float64)
    total, kept = now.sum(axis=1, keepdims=True), past.sum(axis=1, keepdims=True)
    scaled = now * np.where(kept > 0, kept, total) / np.maximum(total, 1e-300)
    use = np.where(total > 0, np.where(kept > 0, weight, 1.0), 0.0)
    blended: FloatArray = use * scaled + (1 - use) * past
    return blended


def _numbered(hosts: Sequence[str]) -> npt.NDArray[np.int64]:
    order = sorted(set(hosts))
    return np.asarray([order.index(host) for host in hosts], dtype=np.int64)


def _first(num_layers: int, num_logical: int, hosts: Sequence[str], num_redundant: int) -> Int32Array:
    """[num_layers, ep_size, slots] even table whose neighbouring ranks are on different hosts."""
    turn = [hosts[:rank].count(host) for rank, host in enumerate(hosts)]
    order = sorted(range(len(hosts)), key=lambda rank: (turn[rank], hosts[rank], rank))
    row = uniform(1, num_logical, len(hosts), num_redundant).physical_to_logical.numpy().reshape(len(hosts), -1)
    table = np.empty_like(row)
    table[order] = row
    return np.repeat(table[None], num_layers, axis=0)


def _carry(present: Placement, layers: npt.NDArray[np.int64], mapping: Sequence[int]) -> Int32Array:
    """[num_layers, ep_size, slots] what each next rank holds already, -1 = empty."""
    old = present.physical_to_logical.numpy()[layers].reshape(len(layers), present.ep_size, -1)
    table = np.full((len(layers), len(mapping), old.shape[2]), -1, dtype=np.int32)
    for rank, rank_before in enumerate(mapping):
        if rank_before >= 0:
            table[:, rank] = old[:, rank_before]
    return table


def _moves(
    placement: Placement, present: Placement | None, mapping: Sequence[int], lost: set[int], hosts: Sequence[str]
) -> tuple[tuple[Move, ...], tuple[tuple[int, int], ...]]:
    """What must be copied where. A copy comes from the same host if it can, else the sources take turns."""
    table, slots = placement.physical_to_logical.numpy(), placement.slots_per_rank
    held: list[list[dict[int, int]]] = []  # by layer, by rank before: logical -> physical
    if present is not None:
        width, before = present.slots_per_rank, present.physical_to_logical.numpy().tolist()
        held = [
            [
                {e: r * width + s for s, e in enumerate(row[r * width : (r + 1) * width]) if e >= 0}
                for r in range(present.ep_size)
            ]
            for row in before
        ]
    host_before = {rank_before: hosts[rank] for rank, rank_before in enumerate(mapping) if rank_before >= 0}
    living = [rank for rank in range(present.ep_size) if rank not in lost] if present is not None else []
    moves: list[Move] = []
    missing: dict[tuple[int, int], None] = {}
    for layer_id, physical in zip(*(table >= 0).nonzero(), strict=True):
        layer_id, physical = int(layer_id), int(physical)
        logical, rank = int(table[layer_id, physical]), physical // slots
        if present is not None and mapping[rank] >= 0 and logical in held[layer_id][mapping[rank]]:
            continue
        sources = [r for r in living if logical in held[layer_id][r]]
        near = [r for r in sources if host_before.get(r) == hosts[rank]] or sources
        source = held[layer_id][near[(layer_id + logical) % len(near)]][logical] if near else -1
        moves.append(Move(layer_id, logical, physical, source))
        if not near:
            missing[layer_id, logical] = None
    return tuple(moves), tuple(missing)
