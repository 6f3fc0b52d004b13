"""Placements by member ids: who stays keeps its experts, whatever its ep_rank becomes. Pure.

`Conductor`'s `Place` is made here. When members leave, the next epoch waits for its slowest loader, so it gets only
what it must have: experts without a living copy. Redundancy and balance follow as a rebalance. A newcomer has to load
anyway: it gets its share at once, within `max_moves`."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ..router.epoch import Epoch, Member
from ..router.placement import Placement, uniform
from .eplb import EplbConfig, Plan, plan

Place = Callable[[int, tuple[Member, ...], Epoch | None], Placement]  # (version, expert members, epoch before)


def eplb_place(
    num_layers: int,
    num_logical: int,
    config: EplbConfig,
    loads: Callable[[], npt.ArrayLike | None],  # [num_layers, num_logical] of the last windows, None = none yet
    moe_layers: Sequence[int] | None = None,
) -> Place:
    """What the membership core asks for the table of its next epoch."""
    layers = tuple(range(num_layers) if moe_layers is None else moe_layers)

    def place(version: int, members: tuple[Member, ...], before: Epoch | None) -> Placement:
        if not members or not layers:  # a dense model has no expert members
            return uniform(num_layers, num_logical, max(1, len(members)), moe_layers=layers, version=version)
        seen = loads()
        known = np.ones((num_layers, num_logical)) if seen is None else seen
        if before is None or not before.expert_ranks:
            return plan(known, [m.host for m in members], config, version=version, moe_layers=layers).placement
        stay = {before.members[rank].member_id for rank in before.expert_ranks}
        joined = any(member.member_id not in stay for member in members)
        bounded = config if joined else replace(config, max_moves=0)
        return plan_for_members(known, members, bounded, version=version, before=before).placement

    return place


def plan_for_members(
    loads: npt.ArrayLike,
    members: Sequence[Member],  # the expert members of the next epoch, in ep_rank order
    config: EplbConfig,
    *,
    version: int,
    before: Epoch,
    lost: frozenset[str] = frozenset(),  # member ids known to be dead: no sources of copies
) -> Plan:
    """`plan` after a death, a join or before a drain."""
    old = [before.members[rank].member_id for rank in before.expert_ranks]
    return plan(
        loads,
        [member.host for member in members],
        config,
        version=version,
        present=before.placement,
        ranks_before=[old.index(m.member_id) if m.member_id in old else -1 for m in members],
        lost=[rank for rank, member_id in enumerate(old) if member_id in lost],
    )
