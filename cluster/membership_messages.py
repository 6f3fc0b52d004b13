"""What members and the Conductor tell each other: events for the membership core, commands from it. Plain values."""

from dataclasses import dataclass

from ..router.epoch import Epoch, Member
from ..router.placement import Placement

# ---- events


@dataclass(frozen=True, slots=True)
class Join:
    """`epoch` = the one that it is in already (the Conductor restarted), `highest_number` = highest it ever prepared,
    `leaving` = it is known again only to leave in good order."""

    member: Member
    epoch: Epoch | None = None
    highest_number: int = 0
    leaving: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    member_id: str
    number: int


@dataclass(frozen=True, slots=True)
class PrepareFailed:
    member_id: str
    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Committed:
    """Also the answer to Retire, with the number of the epoch that it is not in."""

    member_id: str
    number: int


@dataclass(frozen=True, slots=True)
class Alive:
    """The answer to Probe."""

    member_id: str


@dataclass(frozen=True, slots=True)
class Doubt:
    """A step of epoch `number` has taken half of the exchange's deadline: there is time to ask who is silent before
    somebody is accused."""

    member_id: str
    number: int


@dataclass(frozen=True, slots=True)
class Trouble:
    """The epoch is broken, as this member saw it. Where known, `lost_id` names the member whose connection closed, and
    `silent_id` the one that sent nothing until the exchange's deadline."""

    member_id: str
    number: int
    reason: str
    lost_id: str = ""
    silent_id: str = ""


@dataclass(frozen=True, slots=True)
class Leave:
    """Asked to leave in good order: its experts are served elsewhere first."""

    member_id: str


@dataclass(frozen=True, slots=True)
class Suspect:
    """`suspect_id` gives bad rows again and again, as this member saw it: it is drained if others can do its work."""

    member_id: str
    suspect_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """Known to be dead (its process or node ended)."""

    member_id: str


@dataclass(frozen=True, slots=True)
class PlacementRequested:
    """Another table for the same expert ranks; the version in it is replaced by the next one."""

    placement: Placement


@dataclass(frozen=True, slots=True)
class Tick:
    pass


Event = (
    Join
    | Prepared
    | PrepareFailed
    | Committed
    | Alive
    | Doubt
    | Trouble
    | Leave
    | Suspect
    | Lost
    | PlacementRequested
    | Tick
)


# ---- commands, each to one member


@dataclass(frozen=True, slots=True)
class Prepare:
    member_id: str
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Commit:
    member_id: str
    number: int


@dataclass(frozen=True, slots=True)
class Rollback:
    member_id: str
    number: int


@dataclass(frozen=True, slots=True)
class Retire:
    """Not in epoch `number`: lead no more; once all others are in it, nothing needs this member."""

    member_id: str
    number: int


@dataclass(frozen=True, slots=True)
class Probe:
    member_id: str


@dataclass(frozen=True, slots=True)
class Rejoin:
    """This member is unknown here (or was given up): it must join again."""

    member_id: str


Command = Prepare | Commit | Rollback | Retire | Probe | Rejoin
