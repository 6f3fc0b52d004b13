"""Who is a member, and which epoch they work in. Pure: `step(event, now) -> commands`; conductor.py is its shell.

    JOINING --Prepared, Committed--> READY --Leave--> DRAINING --an epoch without it--> gone
       \\________________ Lost, or silent past a deadline ________________> DEAD --Join--> JOINING

All change is a new epoch, made in two phases: Prepare to its members, Commit when all are prepared, Rollback when one
is not. One transition at a time; what comes meanwhile is answered by the next one. Commit goes first to the leader of
the epoch in force, which answers when its last step is over, so that two leaders never name steps at once. A broken
epoch (Trouble) is probed before it is replaced: whoever does not answer is left out. A trouble that names the member
whose connection closed needs no probe: a live one that is given up joins again. State is soft: after a restart the
members join again with their epoch, the newest is adopted, and numbers go on far behind the highest. Idea: two-phase
commit; Raft's terms as fence; torchft's quorum."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

from ..router.epoch import Epoch, Member
from ..router.placement import Placement, uniform
from .membership_messages import (
    Alive,
    Command,
    Commit,
    Committed,
    Doubt,
    Event,
    Join,
    Leave,
    Lost,
    PlacementRequested,
    Prepare,
    Prepared,
    PrepareFailed,
    Probe,
    Rejoin,
    Retire,
    Rollback,
    Suspect,
    Tick,
    Trouble,
)

_MAX_FAILURES = 3  # preparations in a row that a newcomer may fail; relapses that are answered at once
_RELAPSE_S = 1.0
_FENCE = 1000  # numbers left out after a restart: a late answer to a former epoch never looks like one to a new one


class State(Enum):
    JOINING = "joining"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


Place = Callable[[int, tuple[Member, ...], Epoch | None], Placement]  # (version, expert members, epoch before)


def uniform_place(
    num_layers: int, num_logical: int, num_redundant: int, moe_layers: Iterable[int] | None = None
) -> Place:
    """Even placement for whatever members there are."""
    layers = tuple(range(num_layers) if moe_layers is None else moe_layers)

    def place(version: int, members: tuple[Member, ...], before: Epoch | None) -> Placement:
        ep_size = max(1, len(members))  # a dense model has no expert members
        return uniform(num_layers, num_logical, ep_size, num_redundant, moe_layers=layers, version=version)

    return place


@dataclass(slots=True)
class _Transition:
    epoch: Epoch
    waiting: set[str]  # who has not answered in this phase
    deadline: float
    probe_at: float
    phase: str = "prepare"  # prepare -> leader -> commit
    early_trouble: str = ""


class Membership:
    def __init__(
        self,
        *,
        num_attention: int,
        num_expert: int,  # members of each role that the first epoch waits for; a colocated member counts as both
        place: Place,
        make_key: Callable[[], str],  # a fresh random rendezvous key
        prepare_timeout_s: float = 300.0,  # loading experts included
        commit_timeout_s: float = 60.0,
        probe_timeout_s: float = 2.0,  # after a trouble: who is silent for so long is left out
        accused_timeout_s: float = 0.15,  # the same for who has missed the exchange's deadline, if all others answer
        watch_interval_s: float = 10.0,  # the same while a transition waits, where all are busy loading
        rejoin_timeout_s: float = 10.0,  # after a restart of the Conductor
        retry_s: float = 1.0,
    ) -> None:
        self._num_attention, self._num_expert = num_attention, num_expert
        self._place, self._make_key = place, make_key
        self._prepare_timeout_s, self._commit_timeout_s = prepare_timeout_s, commit_timeout_s
        self._probe_timeout_s, self._watch_interval_s = probe_timeout_s, watch_interval_s
        self._accused_timeout_s = accused_timeout_s
        self._rejoin_timeout_s, self._retry_s = rejoin_timeout_s, retry_s
        self.epoch: Epoch | None = None  # in force
        self.members: dict[str, Member] = {}
        self.states: dict[str, State] = {}
        self.last_failure = ""  # why the last transition was rolled back, for people
        self._highest = 0
        self._transition: _Transition | None = None
        self._broken = False
        self._requested: Placement | None = None
        self._silent: set[str] = set()  # members that owe a sign of life
        self._silent_until = 0.0
        self._probe_ends = 0.0
        self._accused: set[str] = set()  # of the silent: those that missed the exchange's deadline before
        self._witnesses: set[str] = set()  # those that reported the trouble
        self._asked: set[str] = set()  # in a step that takes long; who has answered is taken out
        self._asked_ends: float | None = None  # None: nobody is asked
        self._mute: set[str] = set()  # who did not answer then, and has given no sign of life since
        self._retry_at = 0.0
        self._failures: dict[str, int] = {}
        self._in_force_at = 0.0
        self._relapses = 0  # epochs in a row that broke as soon as they were in force

    @property
    def changing(self) -> bool:
        return self._transition is not None

    @property
    def ready(self) -> bool:
        """An epoch is in force, nobody waits to be let in."""
        return self.epoch is not None and self._transition is None and not self._broken and not self._ids(State.JOINING)

    def next_deadline(self) -> float | None:
        """When the shell must send a Tick at the latest; None = nothing runs out."""
        transition = self._transition
        deadlines = [min(transition.deadline, transition.probe_at)] if transition else []
        if self._silent:
            deadlines.append(self._silent_until)
        if self._asked_ends is not None:
            deadlines.append(self._asked_ends)
        if not transition and self._retry_at and not self._silent:  # a retry waits for those who owe a sign of life
            deadlines.append(self._retry_at)
        return min(deadlines, default=None)

    def knows(self, member_id: str) -> bool:
        """False for a member that must join (again) before it is sent anything."""
        return self._is_alive(member_id)

    def step(self, event: Event, now: float) -> list[Command]:
        if not isinstance(event, Join | PlacementRequested | Tick):
            if self.states.get(event.member_id, State.DEAD) is State.DEAD:
                return [] if isinstance(event, Lost | Leave | Committed) else [Rejoin(event.member_id)]
            self._answered(event.member_id, now)
        commands = self._take(event, now)
        return commands + self._advance(now)

    def _take(self, event: Event, now: float) -> list[Command]:
        match event:
            case Join():
                self._join(event, now)
                if event.leaving:
                    return self._take(Leave(event.member.member_id), now)
            case Prepared(member_id, number) | Committed(member_id, number):
                phase_is_prepare = isinstance(event, Prepared)
                transition = self._transition
                if (
                    transition
                    and transition.epoch.number == number
                    and (transition.phase == "prepare") == phase_is_prepare
                ):
                    transition.waiting.discard(member_id)
            case PrepareFailed(member_id, number, reason):
                return self._prepare_failed(member_id, number, reason, now)
            case Doubt(_, number):
                return self._doubt(number, now)
            case Trouble(_, number, reason, lost_id, silent_id):
                if self._is_alive(lost_id) and self._is_known_number(number):
                    return self._lost_in_epoch(lost_id, reason, "its connection closed")
                if silent_id in self._mute and self.epoch is not None and number == self.epoch.number:
                    return self._lost_in_epoch(silent_id, reason, "it answered neither a probe nor its peers")
                return self._trouble(event, now)
            case Leave(member_id):
                self.states[member_id] = State.DRAINING
                return self._leave_at_once(member_id)
            case Suspect(_, suspect_id, reason):
                if self._can_spare(suspect_id):
                    self.last_failure = f"{suspect_id} is drained: {reason}"
                    return self._take(Leave(suspect_id), now)
                self.last_failure = f"{suspect_id} is suspect, and nobody can take its place: {reason}"
            case Lost(member_id):
                return self._give_up({member_id}, "its process ended")
            case PlacementRequested(placement):
                self._requested = placement
            case Tick():
                return self._tick(now)
            case Alive():
                pass  # noted above
        return []

    # ---- events

    def _join(self, event: Join, now: float) -> None:
        member_id = event.member.member_id
        if event.highest_number > self._highest:  # of a former Conductor, whose last numbers nobody may have told yet
            self._highest = event.highest_number + _FENCE
        adopted = event.epoch
        self._failures.pop(member_id, None)
        if adopted and (self.epoch is None or adopted.number > self.epoch.number) and not self._transition:
            self._broken = self.epoch is not None  # some are an epoch behind: make one that all enter
            self._adopt(adopted, now)
        for owing in (self._silent, self._asked, self._mute):
            owing.discard(member_id)
        self.members[member_id] = event.member
        if (
            self.epoch
            and event.epoch
            and event.epoch.number == self.epoch.number
            and event.member in self.epoch.members
        ):
            self.states[member_id] = State.READY
        else:
            self.states[member_id] = State.JOINING
            if self.epoch and event.member in self.epoch.members:
                self._broken = True  # it is in the epoch in force, but has lost it

    def _adopt(self, epoch: Epoch, now: float) -> None:
        """After a restart: this epoch is in force; its members are expected to join again soon."""
        self.epoch, self._highest = epoch, max(self._highest, epoch.number)
        for member in epoch.members:
            if self.states.get(member.member_id) in (None, State.DEAD):
                self.members[member.member_id], self.states[member.member_id] = member, State.READY
                self._silent.add(member.member_id)
        self._silent_until = now + self._rejoin_timeout_s

    def _leave_at_once(self, member_id: str) -> list[Command]:
        """A member that serves in no epoch yet just goes; one that was about to is taken out of the transition."""
        transition = self._transition
        commands: list[Command] = []
        if transition and transition.phase == "prepare" and _named(member_id, transition.epoch):
            commands = self._roll_back(f"{member_id} leaves")
            transition = None
        if not _named(member_id, self.epoch) and not (transition and _named(member_id, transition.epoch)):
            del self.states[member_id], self.members[member_id]
            commands.append(Retire(member_id, 0))
        return commands

    def _prepare_failed(self, member_id: str, number: int, reason: str, now: float) -> list[Command]:
        transition = self._transition
        if not transition or transition.epoch.number != number or transition.phase != "prepare":
            return []
        self._failures[member_id] = self._failures.get(member_id, 0) + 1
        commands = self._roll_back(f"{member_id} could not prepare epoch {number}: {reason}")
        if self._failures[member_id] >= _MAX_FAILURES and self.states[member_id] is State.JOINING:
            self.states[member_id] = State.DEAD  # it must not hold up the others; its next poll makes it join again
        self._retry_at = now + self._retry_s
        # Why it failed may be another that is dead: the next try would name it again, and fail at once again.
        alive = [m.member_id for m in transition.epoch.members if self._is_alive(m.member_id)]
        return commands + self._probe(alive, now + self._probe_timeout_s)

    def _doubt(self, number: int, now: float) -> list[Command]:
        """A step takes long. Who does not answer now hangs, should the exchange's deadline name it: nothing is left to
        be waited for then."""
        if self.epoch is None or number != self.epoch.number or self._broken or self._asked_ends is not None:
            return []
        self._asked = {m.member_id for m in self.epoch.members if self._is_alive(m.member_id)}
        self._asked_ends = now + self._accused_timeout_s
        return [Probe(member_id) for member_id in sorted(self._asked)]

    def _trouble(self, trouble: Trouble, now: float) -> list[Command]:
        number, reason, transition = trouble.number, trouble.reason, self._transition
        if transition and number == transition.epoch.number:
            transition.early_trouble = reason  # some are in it already; counted when it is in force
            return []
        if self.epoch is None or number != self.epoch.number:
            return []
        if self._broken:
            self._accuse(trouble, now)
            return []
        self._broken = True
        self.last_failure = reason
        self._relapses = self._relapses + 1 if now - self._in_force_at < _RELAPSE_S else 0
        if self._relapses >= _MAX_FAILURES:  # nothing is cured by another epoch at once; members may heal or be drained
            self._retry_at = now + self._retry_s * min(2 ** (self._relapses - _MAX_FAILURES), 10)
        commands: list[Command] = []
        if transition and transition.phase == "prepare":
            commands += self._roll_back(reason)  # it may share the broken communicator, or the dead member
        alive = [m.member_id for m in self.epoch.members if self._is_alive(m.member_id)]
        commands += self._probe(alive, now + self._probe_timeout_s)
        self._accuse(trouble, now)
        return commands

    def _accuse(self, trouble: Trouble, now: float) -> None:
        """Who has missed the exchange's deadline is not waited for as long as others, once all others have answered.
        Who reports trouble itself only waited behind somebody."""
        self._witnesses.add(trouble.member_id)
        self._accused.discard(trouble.member_id)
        if trouble.silent_id in self._silent - self._witnesses:
            self._accused.add(trouble.silent_id)
            self._silent_until = min(self._silent_until, now + self._accused_timeout_s)

    def _answered(self, member_id: str, now: float) -> None:
        """A sign of life. Once all but the accused have given one, late as it may be, those have a moment more."""
        self._asked.discard(member_id)
        self._mute.discard(member_id)
        if member_id in self._silent:
            self._silent.discard(member_id)
            if self._silent and self._silent <= self._accused and self._silent_until == self._probe_ends:
                self._silent_until = min(self._probe_ends, now + self._accused_timeout_s)

    def _is_known_number(self, number: int) -> bool:
        """Of the epoch in force or of the one that some are entering; older news may be about a former connection."""
        return number in {e.number for e in (self.epoch, self._transition and self._transition.epoch) if e}

    def _lost_in_epoch(self, member_id: str, reason: str, why: str) -> list[Command]:
        """The cause is known: the probe of an earlier trouble is not waited for, the transition's own follows."""
        if not self._broken:
            self.last_failure = reason
        self._silent.clear()
        return self._give_up({member_id}, why)

    def _probe(self, member_ids: Iterable[str], until: float) -> list[Command]:
        asked = sorted(member_ids)
        self._silent |= set(asked)
        self._silent_until = self._probe_ends = until
        self._accused.clear()
        self._witnesses.clear()
        return [Probe(member_id) for member_id in asked]

    def _tick(self, now: float) -> list[Command]:
        commands: list[Command] = []
        if self._asked_ends is not None and now >= self._asked_ends:
            self._mute, self._asked, self._asked_ends = self._asked, set(), None
        if self._silent and now >= self._silent_until:
            if self._silent <= self._accused or now >= self._probe_ends:
                commands += self._give_up(set(self._silent), "it did not answer")
            else:
                self._silent_until = self._probe_ends  # others are slow too: no ground for a hasty word
        transition = self._transition
        if transition and now >= transition.deadline:
            if transition.phase == "prepare":  # slow, but alive: they answer probes
                late = ", ".join(sorted(transition.waiting))
                commands += self._roll_back(f"epoch {transition.epoch.number} was not prepared in time by {late}")
                self._retry_at = now + self._retry_s
            else:
                commands += self._give_up(set(transition.waiting), "it did not commit in time")
        elif transition and not self._silent and now >= transition.probe_at:
            transition.probe_at = now + self._watch_interval_s
            commands += self._probe(transition.waiting, transition.probe_at)
        return commands

    def _give_up(self, member_ids: set[str], why: str) -> list[Command]:
        """These members are dead to us. A transition that needs one of them is rolled back, or goes on without where it
        has been committed already."""
        for member_id in member_ids:
            self.states[member_id] = State.DEAD
            self._silent.discard(member_id)
            self._mute.discard(member_id)
        if self.epoch and any(m.member_id in member_ids for m in self.epoch.members):
            self._broken = True
        transition = self._transition
        if not transition:
            return []
        named = {m.member_id for m in transition.epoch.members}
        transition.waiting -= member_ids
        if not member_ids & named:
            return []
        if transition.phase == "commit":
            self._broken = True  # in force, and a member is missing: the next transition follows
            return []
        return self._roll_back(f"{', '.join(sorted(member_ids & named))} left epoch {transition.epoch.number}: {why}")

    def _roll_back(self, reason: str) -> list[Command]:
        transition, self._transition = self._transition, None
        assert transition is not None
        self.last_failure = reason
        return [
            Rollback(m.member_id, transition.epoch.number)
            for m in transition.epoch.members
            if self._is_alive(m.member_id)
        ]

    # ---- what follows

    def _advance(self, now: float) -> list[Command]:
        """Go through phases that wait for nobody, then begin the next transition if one is due."""
        commands: list[Command] = []
        while (transition := self._transition) and not transition.waiting:
            commands += self._next_phase(transition, now)
        if not self._transition:
            commands += self._begin(now)
        return commands

    def _next_phase(self, transition: _Transition, now: float) -> list[Command]:
        transition.deadline = now + self._commit_timeout_s
        number = transition.epoch.number
        first = self._leader_in_force()
        if transition.phase == "prepare":
            transition.phase = "leader"
            if first is not None:
                return self._tell_commit(transition, [first])
            return []
        if transition.phase == "leader":
            transition.phase = "commit"
            before = {m.member_id for m in self.epoch.members} if self.epoch else set()
            new = {m.member_id for m in transition.epoch.members}
            self.epoch, self._broken, self._in_force_at = transition.epoch, False, now
            # Who was in the epoch before, was given up and has joined again waits for the next one: it is not let go.
            returned = {m for m in before - new - {first} if self.states.get(m) in (State.JOINING, State.READY)}
            self.states |= dict.fromkeys(sorted(returned), State.JOINING)
            others = sorted((before | new) - {first} - returned)
            commands = self._tell_commit(transition, [m for m in others if self._is_alive(m)])
            return commands + (self._trouble_in_new(transition, now) if transition.early_trouble else [])
        self._transition = None
        self._failures.clear()
        self._retry_at = 0.0
        for member in transition.epoch.members:
            if self.states[member.member_id] is State.JOINING:
                self.states[member.member_id] = State.READY
        for member_id in [
            m for m in self._ids(State.DRAINING) if all(m != e.member_id for e in transition.epoch.members)
        ]:
            del self.states[member_id], self.members[member_id]
        assert self.epoch is not None
        assert self.epoch.number == number
        return []

    def _tell_commit(self, transition: _Transition, member_ids: list[str]) -> list[Command]:
        number, named = transition.epoch.number, {m.member_id for m in transition.epoch.members}
        transition.waiting = set(member_ids)
        return [Commit(m, number) if m in named else Retire(m, number) for m in member_ids]

    def _leader_in_force(self) -> str | None:
        if self.epoch is None:
            return None
        leader = self.epoch.members[self.epoch.leader_rank].member_id
        # One that has joined again leads that epoch no more, or has never begun to.
        return leader if self.states.get(leader) in (State.READY, State.DRAINING) else None

    def _begin(self, now: float) -> list[Command]:
        """Form the next epoch if the present one is not what it should be."""
        if self._silent or now < self._retry_at:
            return []
        self._retry_at = 0.0
        target = self._target()
        before = self.epoch
        if not self._complete(target):
            return []
        placement = self._next_placement(target, self._highest + 1)
        same_members = before is not None and before.members == target
        if before is not None and same_members and not self._broken and placement is before.placement:
            return []
        keeps_group = before is not None and same_members and not self._broken
        self._requested = None
        self._highest += 1
        leader = next(m for m in target if m.attention)
        epoch = Epoch(
            number=self._highest,
            members=target,
            placement=placement,
            rendezvous_key=before.rendezvous_key if before is not None and keeps_group else self._make_key(),
            store_host=leader.host,
            store_port=leader.store_port,
        )
        waiting = {m.member_id for m in target}
        # After a break another may be dead whom nobody has named: ask soon, with the patience that loading needs.
        probe_in_s = self._probe_timeout_s if self._broken else self._watch_interval_s
        self._transition = _Transition(epoch, waiting, now + self._prepare_timeout_s, now + probe_in_s)
        return [Prepare(m.member_id, epoch) for m in target]

    def _target(self) -> tuple[Member, ...]:
        """Those who should work together: survivors in their old order (the leader stays), newcomers behind."""
        kept = [m for m in self.epoch.members if self._usable(m)] if self.epoch else []
        known = {m.member_id for m in kept}
        joining = [self.members[i] for i in self._ids(State.JOINING) if i not in known]
        return tuple(kept + joining)

    def _usable(self, member: Member) -> bool:
        state = self.states.get(member.member_id, State.DEAD)
        return state in (State.READY, State.JOINING) and self.members.get(member.member_id) == member

    def _complete(self, target: tuple[Member, ...]) -> bool:
        num_attention, num_expert = sum(m.attention for m in target), sum(m.expert for m in target)
        if self.epoch is None:
            return num_attention >= self._num_attention and num_expert >= self._num_expert
        return num_attention >= 1 and num_expert >= min(1, self._num_expert)

    def _next_placement(self, target: tuple[Member, ...], version: int) -> Placement:
        """A new table's version is the number of the epoch that brings it: never used twice, not even after a
        rollback."""
        experts = tuple(m for m in target if m.expert)
        before = self.epoch
        if before is None:
            return self._place(version, experts, None)
        if experts != tuple(m for m in before.members if m.expert):
            return self._place(version, experts, before)
        if self._requested is not None:
            asked = self._requested
            if asked.ep_size != before.placement.ep_size or asked.num_layers != before.placement.num_layers:
                self._requested = None
                self.last_failure = "the requested placement is not one of these expert ranks"
                return before.placement
            return Placement(version, asked.num_logical_experts, asked.ep_size, asked.physical_to_logical)
        return before.placement

    def _can_spare(self, member_id: str) -> bool:
        """It is a member, and others of its kinds stay."""
        member = self.members.get(member_id)
        if member is None or self.states.get(member_id) not in (State.READY, State.JOINING):
            return False
        others = [m for name, m in self.members.items() if name != member_id and self._usable(m)]
        return any(m.attention for m in others) and any(m.expert for m in others)

    def _ids(self, state: State) -> list[str]:
        return [member_id for member_id, s in self.states.items() if s is state]

    def _is_alive(self, member_id: str) -> bool:
        return self.states.get(member_id, State.DEAD) is not State.DEAD

    def _trouble_in_new(self, transition: _Transition, now: float) -> list[Command]:
        reason, transition.early_trouble = transition.early_trouble, ""
        self._broken, self.last_failure = True, reason
        alive = [m.member_id for m in transition.epoch.members if self._is_alive(m.member_id)]
        return self._probe(alive, now + self._probe_timeout_s)


def _named(member_id: str, epoch: Epoch | None) -> bool:
    return epoch is not None and any(m.member_id == member_id for m in epoch.members)
