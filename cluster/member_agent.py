"""A member's side of membership: it joins, polls for commands, performs them on its mesh and reports.

It runs in a thread with an event loop of its own, so that neither the engine nor a busy server loop delays it. A
command that blocks (Prepare builds communicators and loads experts; Commit waits for a step's end) runs in a daemon
thread beside it: probes are answered meanwhile. It knows the Conductor only as three coroutines; Ray is behind them
or not."""

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Protocol

from ..errors import ExchangeTimeout, ExpertMeshError, ReplicaLost, Unavailable
from ..router.epoch import Epoch, Member
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
    Prepare,
    Prepared,
    PrepareFailed,
    Probe,
    Rejoin,
    Retire,
    Rollback,
    Suspect,
    Trouble,
)

_log = logging.getLogger(__name__)
_POLL_S = 20.0
_RETRY_S = 0.5  # between calls to a Conductor that does not answer
_STOP_S = 5.0
_WATCH_S = 0.2  # between two looks at the step under way


class ConductorClient(Protocol):
    """What an agent needs of the Conductor; each call ends within its time or raises `Unavailable`."""

    async def join(self, event: Join) -> None: ...

    async def tell(self, event: Event) -> None: ...

    async def next_commands(self, member_id: str, after: int, timeout_s: float) -> tuple[int, list[Command]]: ...


class AgentMesh(Protocol):
    """The part of `router.mesh.ClusterMesh` that an agent drives."""

    @property
    def member(self) -> Member: ...

    @property
    def epoch(self) -> Epoch | None: ...

    @property
    def highest_number(self) -> int: ...

    def long_step(self) -> tuple[int, int] | None: ...

    def prepare(self, epoch: Epoch) -> None: ...

    def commit(self, number: int) -> None: ...

    def rollback(self, number: int) -> None: ...

    def retire(self) -> None: ...


class MemberAgent:
    """`start` once; `on_trouble` is the mesh's callback; `drain` leaves in good order, `stop` at once."""

    def __init__(self, mesh: AgentMesh, conductor: ConductorClient) -> None:
        self._mesh, self._conductor = mesh, conductor
        self._id = mesh.member.member_id
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._stopping: asyncio.Event | None = None
        self._retired = threading.Event()
        self._leaving = False
        self._asked_to_retire = False
        self._dropped: set[int] = set()  # epochs rolled back while they were still being prepared
        self._outbox: asyncio.Queue[Event] = asyncio.Queue()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="member-agent", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._started.wait(timeout=_STOP_S)

    def on_trouble(self, epoch: int, error: ExpertMeshError) -> None:
        """From any thread: the epoch broke here."""
        lost_id = error.member_id if isinstance(error, ReplicaLost) else ""
        self._report(Trouble(self._id, epoch, str(error), lost_id, self._silent_id(epoch, error)))

    def _silent_id(self, number: int, error: ExpertMeshError) -> str:
        """Who sent nothing until the deadline, if it was that."""
        epoch = self._mesh.epoch
        if not isinstance(error, ExchangeTimeout) or epoch is None or epoch.number != number or error.peer < 0:
            return ""
        return epoch.members[error.peer].member_id

    def on_suspect(self, suspect_id: str, reason: str) -> None:
        """From any thread: this member's rows come back bad from there, or its weights cannot be repaired."""
        self._report(Suspect(self._id, suspect_id, reason))

    def drain(self, timeout_s: float) -> bool:
        """Ask to leave and wait until nothing needs this member. False = not within the time."""
        self._leaving = True
        self._report(Leave(self._id))
        return self._retired.wait(timeout_s)

    @property
    def retired(self) -> bool:
        """Nothing needs this member any more: it left by `drain`, or the Conductor took it out."""
        return self._retired.is_set()

    def stop(self) -> None:
        """End the thread; the Conductor hears that this member is gone, if it still listens."""
        self._leaving = True
        if self._loop is not None and self._stopping is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(timeout=_STOP_S)

    # -- in the agent's thread

    async def _run(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        self._started.set()
        tasks = [asyncio.create_task(work) for work in (self._send(), self._poll(), self._watch())]
        await self._stopping.wait()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(1.0):
                await self._conductor.tell(Lost(self._id))
        except (Unavailable, TimeoutError):
            _log.info("the conductor did not hear that %s ended", self._id)

    async def _poll(self) -> None:
        await self._join()
        after, just_joined = 0, True
        while True:
            try:
                after, commands = await self._conductor.next_commands(self._id, after, _POLL_S)
            except Unavailable as error:
                _log.warning("polling the conductor: %s", error)
                await asyncio.sleep(_RETRY_S)
                continue
            for command in commands:
                if isinstance(command, Rejoin):
                    needed = self._mesh.epoch is not None and not self._asked_to_retire
                    if self._leaving and (just_joined or not needed):
                        self._retired.set()  # nobody knows us: nobody needs us
                        return
                    await self._join()
                    after, just_joined = 0, True
                    break
                self._perform(command)
            else:
                just_joined = False

    async def _join(self) -> None:
        while True:
            try:
                mesh = self._mesh
                event = Join(mesh.member, mesh.epoch, mesh.highest_number, self._leaving)
                await self._conductor.join(event)
                if self._leaving and not event.leaving:
                    self._report(Leave(self._id))  # asked meanwhile: a Leave that came before the Join was nobody's
                return
            except Unavailable as error:
                _log.warning("joining: %s", error)
                await asyncio.sleep(_RETRY_S)

    async def _watch(self) -> None:
        """Says of a step once that it takes long."""
        told = None
        while True:
            await asyncio.sleep(_WATCH_S)
            step = self._mesh.long_step()
            if step is not None and step != told:
                told = step
                self._report(Doubt(self._id, step[0]))

    async def _send(self) -> None:
        """Events leave one after the other, each until the Conductor has it."""
        while True:
            event = await self._outbox.get()
            while True:
                try:
                    await self._conductor.tell(event)
                    break
                except Unavailable as error:
                    _log.warning("telling the conductor %s: %s", type(event).__name__, error)
                    await asyncio.sleep(_RETRY_S)

    def _perform(self, command: Command) -> None:
        _log.info("%s: %s", self._id, _describe(command))
        match command:
            case Prepare(_, epoch):
                self._beside(lambda: self._prepare(epoch))
            case Commit(_, number):
                self._beside(lambda: self._commit(number))
            case Rollback(_, number):
                self._dropped.add(number)
                self._beside(lambda: self._mesh.rollback(number))
            case Retire(_, number):
                self._asked_to_retire = True
                self._beside(lambda: self._retire(number))
            case Probe():
                self._report(Alive(self._id))

    # -- in threads beside it

    def _prepare(self, epoch: Epoch) -> None:
        try:
            self._mesh.prepare(epoch)
        except (ExpertMeshError, OSError, RuntimeError, MemoryError) as error:
            _log.warning("epoch %d was not prepared: %s", epoch.number, error)
            self._report(PrepareFailed(self._id, epoch.number, f"{type(error).__name__}: {error}"))
            return
        if epoch.number in self._dropped:
            self._mesh.rollback(epoch.number)
        else:
            self._report(Prepared(self._id, epoch.number))

    def _commit(self, number: int) -> None:
        try:
            self._mesh.commit(number)
        except ExpertMeshError as error:  # the Conductor's deadline takes this member out
            _log.error("epoch %d was not committed: %s", number, error)
            return
        self._report(Committed(self._id, number))

    def _retire(self, number: int) -> None:
        try:
            self._mesh.retire()
        except ExpertMeshError as error:
            _log.error("leaving before epoch %d: %s", number, error)
            return
        self._leaving = True  # whoever asked for it: it does not join again
        self._report(Committed(self._id, number))
        self._retired.set()

    def _beside(self, work: Callable[[], None]) -> None:
        threading.Thread(target=work, name="member-command", daemon=True).start()

    def _report(self, event: Event) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._outbox.put_nowait, event)


def _describe(command: Command) -> str:
    if isinstance(command, Prepare):
        return f"Prepare epoch {command.epoch.number} of {len(command.epoch.members)} members"
    return repr(command)
