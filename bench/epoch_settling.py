"""Does a small cluster come to serve again? `epoch_world.py` without further faults, until it does."""

from ..cluster.membership import State
from .epoch_world import ROLES, Budget, Move, Violation, World, can_enter, describe, describe_move, make, moves

_MAX_SETTLING = 600  # events until a cluster without faults must serve


def settle(world: World, *, newest_first: bool) -> None:
    """No more faults: what is pending happens, deadlines pass when nothing else does. Violation if it never serves."""
    world = world.copy()
    world.budget = Budget()
    path: list[str] = []
    for _ in range(_MAX_SETTLING):
        pending = list(moves(world))
        if not pending and is_serving(world):
            return
        move = pending[-1 if newest_first else 0] if pending else idle_move(world)
        path.append(describe_move(world, move))
        make(world, move)
        world.budget = Budget()
    raise Violation("it does not come to serve: " + "; ".join([*path[:12], "...", *path[-24:]]))


def idle_move(world: World) -> Move:
    """Nothing is pending: a leader tries a step, a deadline passes, the Conductor misses the dead."""
    for name, node in world.nodes.items():
        if node.alive and node.leads and not node.failed and not serves(world, name):
            return "issues a step", name, -1
    if world.core.next_deadline() is not None:
        return "passes", "a deadline", -1
    for name, node in world.nodes.items():
        if not node.alive and world.core.knows(name):
            return "polls no more", name, -1
    raise Violation(f"nothing is pending and it does not serve: {describe(world)}")


def is_serving(world: World) -> bool:
    """Or cannot: no attention member, or no copy of an expert, lives."""
    living = {n for n, node in world.nodes.items() if node.alive and node.started and not node.retired}
    wanted = {n for n in living if not world.nodes[n].leaving}
    if not any(ROLES[n] == "a" for n in wanted) or not any(ROLES[n] == "e" for n in wanted):
        return True
    epoch, core = world.core.epoch, world.core
    if epoch is None or not core.ready:
        return False
    names = {m.member_id for m in epoch.members}
    drained = {n for n, state in core.states.items() if state is State.DRAINING}
    leader = epoch.members[epoch.leader_rank].member_id
    return names == wanted - drained and serves(world, leader)


def serves(world: World, leader: str) -> bool:
    """A step of this leader would go through."""
    node = world.nodes[leader]
    if not node.alive or not node.leads or node.failed or node.committed < 0:
        return False
    epoch = World.records[node.committed]
    return epoch.rendezvous_key not in world.broken and all(
        can_enter(world, m.member_id, node.committed) for m in epoch.members
    )
