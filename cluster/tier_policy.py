"""The autoscaling policy as Serve's controller makes it: `autoscale.ServePolicy` with the Conductor behind it.

Serve keeps a policy's arguments as JSON, so it gets the Conductor's name. The controller must not be held up: calls are
sent, and an answer is taken when it has come."""

from time import monotonic
from typing import Any

import ray

from ..router.status import ScaleWish
from .autoscale import ATTENTION, ServePolicy
from .conductor_client import ConductorClient

ASK_S = 1.0  # how often an operator's wish is looked for


class TierPolicy(ServePolicy):
    """Of the expert tier, whose number an operator may ask for."""

    def __init__(self, conductor: str, **policy: Any) -> None:
        super().__init__(link=PolicyLink(conductor), **policy)


class AttentionTierPolicy(ServePolicy):
    """Of the attention tier, within its configured bounds."""

    def __init__(self, conductor: str, **policy: Any) -> None:
        super().__init__(link=DecisionsLink(conductor), **{**ATTENTION, **policy})


class DecisionsLink:
    """Tells the Conductor of decisions; nobody's wish comes back."""

    def __init__(self, conductor: str) -> None:
        self._client = ConductorClient(conductor)

    def wish(self) -> ScaleWish | None:
        return None

    def decided(self, told: dict[str, Any]) -> None:
        self._client.send("decided", told)


class PolicyLink:
    """`autoscale.PolicyLink` by calls to the Conductor's actor."""

    def __init__(self, conductor: str) -> None:
        self._client = ConductorClient(conductor)
        self._asked: Any = None
        self._asked_at = 0.0
        self._wish: ScaleWish | None = None

    def wish(self) -> ScaleWish | None:
        """The operator's last wish as far as it is known here; None = none yet."""
        if self._asked is None and monotonic() - self._asked_at >= ASK_S:
            self._asked_at, self._asked = monotonic(), self._client.send("scale_wish")
        if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            answered, self._asked = self._asked, None
            try:
                self._wish = ray.get(answered) or self._wish
            except ray.exceptions.RayError:  # it restarts: asked again in a moment, of its new self
                self._client = ConductorClient(self._client.name)
        return self._wish

    def decided(self, told: dict[str, Any]) -> None:
        self._client.send("decided", told)
