"""The mesh of one process that owns both roles: what an engine without a cluster stands on."""

from .contracts import LocalExperts
from .epoch import Epoch
from .exchange import RowShape
from .mesh import ClusterMesh, MeshOptions
from .placement import Placement


class LocalMesh(ClusterMesh):
    """Epoch 1 is in force at once, the exchange is local, a bid is answered within the call."""

    def __init__(
        self,
        experts: LocalExperts | None,
        placement: Placement,
        shape: RowShape,
        *,
        max_prefill_tokens_per_step: int = 1024,
        buckets: tuple[int, ...] = (),
    ) -> None:
        options = MeshOptions(max_prefill_tokens_per_step=max_prefill_tokens_per_step, buckets=buckets)
        super().__init__("local#0", attention=True, experts=experts, shape=shape, options=options, listen=False)
        self.change_placement(placement)

    def change_placement(self, placement: Placement) -> None:
        """Enter a new epoch with this placement at the next step boundary."""
        number = max(self._epochs, default=0) + 1
        self.prepare(Epoch(number=number, members=(self.member,), placement=placement))
        self.commit(number)
