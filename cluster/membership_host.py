"""The membership core with a clock and mailboxes: what the Conductor's process runs. Asyncio, no Ray.

A member's commands wait in its mailbox until the member has acknowledged them (`after`), so a lost answer loses
nothing. A member that is unknown here is told to join again: that is how a restarted Conductor learns who there
is."""

import asyncio
import contextlib
from collections.abc import Callable
from time import monotonic

from .membership import Membership
from .membership_messages import Command, Event, Join, Rejoin, Tick


class MembershipHost:
    """`join`, `tell` and `next_commands` are what `member_agent.ConductorClient` calls, through whatever carries
    calls."""

    def __init__(
        self,
        core: Membership,
        *,
        clock: Callable[[], float] = monotonic,
        on_change: Callable[[], None] = lambda: None,  # called after every event: epoch or readiness may have changed
    ) -> None:
        self.core = core
        self._clock, self._on_change = clock, on_change
        self._mailboxes: dict[str, _Mailbox] = {}
        self._joined: set[str] = set()  # here: who knows only a former Conductor's numbers must not acknowledge by them
        self._timer: asyncio.TimerHandle | None = None

    async def join(self, event: Join) -> None:
        member_id = event.member.member_id
        mailbox = _Mailbox()  # it starts anew, from number 0
        for command in self._mailboxes[member_id].commands if member_id in self._mailboxes else ():
            mailbox.post(command)  # meant for it before it came: its epoch was adopted, or this is a second try
        self._mailboxes[member_id] = mailbox
        self._joined.add(member_id)
        self.take(event)

    async def tell(self, event: Event) -> None:
        self.take(event)

    async def next_commands(self, member_id: str, after: int, timeout_s: float) -> tuple[int, list[Command]]:
        """Commands behind number `after` and the number of the last; waits up to `timeout_s` for one to come."""
        mailbox = self._mailboxes.get(member_id)
        if mailbox is None or member_id not in self._joined or not self.core.knows(member_id):
            return 0, [Rejoin(member_id)]
        mailbox.acknowledge(after)
        if not mailbox.commands:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await mailbox.filled.wait()
        return mailbox.last, list(mailbox.commands)

    def take(self, event: Event) -> None:
        """Give the core an event and post its commands."""
        for command in self.core.step(event, self._clock()):
            self._mailboxes.setdefault(command.member_id, _Mailbox()).post(command)
        for member_id in [m for m in self._mailboxes if not self.core.knows(m)]:
            self._mailboxes.pop(member_id).post(Rejoin(member_id))  # ends the poll of one that was given up but lives
            self._joined.discard(member_id)
        self._set_timer()
        self._on_change()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self.core.next_deadline()
        if deadline is not None:
            delay_s = max(0.01, deadline - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self.take, Tick())


class _Mailbox:
    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.last = 0  # number of the newest command
        self.filled = asyncio.Event()

    def post(self, command: Command) -> None:
        self.commands.append(command)
        self.last += 1
        self.filled.set()

    def acknowledge(self, after: int) -> None:
        keep = max(0, self.last - after)
        self.commands = self.commands[len(self.commands) - keep :] if keep else []
        if not self.commands:
            self.filled.clear()
