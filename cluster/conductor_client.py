"""The Conductor as every other process sees it: coroutines for members and gateways, plain calls for the driver.

Neither torch nor the membership core is imported here: a gateway gets a client pickled, and Ray imports an actor's
class in every process that looks the actor up, Serve's controller included. So that class is here too; the Conductor
itself is imported where it runs."""

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import ray

from ..config import ClusterConfig
from ..errors import ExpertMeshError, Unavailable
from ..router.status import ClusterState, ExpertRows, ProcessStatus, ScaleWish

if TYPE_CHECKING:
    from ..router.epoch import Epoch
    from ..router.placement import Placement
    from .membership_messages import Command, Event, Join

NAMESPACE = "expertmesh"
WATCH_S = 20.0  # a long poll's length: an idle watcher costs one call in this time
CALL_TIMEOUT_S = 10.0
PLAN_S = 60.0  # a placement of a large model is seconds of work
# ValueError: no actor of this name (any more).
_NO_ANSWER = (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError, ValueError, TimeoutError)


class ConductorActor:
    """The Conductor in its process; its methods by name, all coroutines."""

    def __init__(self, config_text: str) -> None:
        from .conductor import Conductor

        self._conductor = Conductor(config_text)

    async def call(self, method: str, *arguments: Any) -> Any:
        return await getattr(self._conductor, method)(*arguments)


def start_conductor(name: str, config: ClusterConfig) -> None:
    """Make the actor if there is none of this name, without waiting for it. Whatever kills it, Ray starts it again with
    the same configuration."""
    options = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "num_cpus": 0, "max_restarts": -1}
    options["get_if_exists"] = True
    ray.remote(ConductorActor).options(**options).remote(config.to_json())


class ConductorClient:
    """The Conductor from any process of the cluster. Only its name is pickled, the actor is looked up at first use."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._actor: Any = None

    def __reduce__(self) -> tuple[type["ConductorClient"], tuple[str]]:
        return ConductorClient, (self.name,)

    # As a member.

    async def join(self, event: "Join") -> None:
        await self._call("join", event)

    async def tell(self, event: "Event") -> None:
        await self._call("tell", event)

    async def next_commands(self, member_id: str, after: int, timeout_s: float) -> "tuple[int, list[Command]]":
        found: tuple[int, list[Command]] = await self._call(
            "next_commands", member_id, after, timeout_s, wait_s=timeout_s
        )
        return found

    # As any process (`router.status.ConductorLink`).

    async def report(self, status: ProcessStatus) -> None:
        await self._call("report", status)

    async def report_rows(self, rows: ExpertRows) -> None:
        await self._call("report_rows", rows)

    async def forget(self, name: str) -> None:
        await self._call("forget", name)

    async def fail(self, name: str, message: str) -> None:
        await self._call("fail", name, message)

    async def state(self) -> ClusterState:
        return await self._call("state")

    async def watch(self, version: int, timeout_s: float = WATCH_S) -> ClusterState:
        return await self._call("watch", version, timeout_s, wait_s=timeout_s)

    # As a gateway, for an operator (`router.gateway.operations.Operator`).

    async def scale(self, wish: ScaleWish) -> str:
        return str(await self._call("scale", wish))

    async def drain(self, member_id: str) -> str:
        return str(await self._call("drain", member_id))

    async def rebalance(self, reason: str) -> str:
        return str(await self._call("rebalance", reason, wait_s=PLAN_S))

    # From a thread without an event loop.

    def place(self, placement: "Placement") -> None:
        self._get("place", placement)

    def epoch(self) -> "Epoch | None":
        found: Epoch | None = self._get("epoch")
        return found

    def state_now(self) -> ClusterState:
        found: ClusterState = self._get("state")
        return found

    def close(self) -> None:
        self._get("close")

    def kill(self) -> None:
        """End the actor for good. An actor that is already gone is fine."""
        if ray.is_initialized():
            with contextlib.suppress(ValueError, ray.exceptions.RayError):
                ray.kill(self._handle(), no_restart=True)

    def send(self, method: str, *arguments: Any) -> Any:
        """Begin a call and wait for nothing; None where there is no Conductor."""
        try:
            return self._submit(method, arguments)
        except _NO_ANSWER:
            self._actor = None
            return None

    async def _call(self, method: str, *arguments: Any, wait_s: float = 0.0) -> Any:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S + wait_s):
                return await self._submit(method, arguments)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, ExpertMeshError) else error) from None
        except _NO_ANSWER as error:
            self._actor = None
            raise Unavailable(f"the conductor does not answer {method}: {error}") from error

    def _get(self, method: str, *arguments: Any) -> Any:
        try:
            return ray.get(self._submit(method, arguments), timeout=CALL_TIMEOUT_S)
        except _NO_ANSWER as error:
            self._actor = None
            raise Unavailable(f"the conductor does not answer {method}: {error}") from error

    def _submit(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return self._handle().call.remote(method, *arguments)

    def _handle(self) -> Any:
        if self._actor is None:
            self._actor = ray.get_actor(self.name, namespace=NAMESPACE)  # ValueError: no such actor
        return self._actor
