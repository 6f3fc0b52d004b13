"""The serving thread of a member that owns experts and sends no tokens: takes part in every step that names it.

Apart from the deployment around it (`worker.py`), so that members run and are tested where there is no Ray."""

import logging
import queue
import threading

from ..errors import EpochError, ExchangeError, ReplicaLost
from ..router.epoch import StepHeader
from ..router.group import use_batch_scheduling
from ..router.mesh import ClusterMesh
from ..router.status import describe_error
from ..telemetry import ATTR_EPOCH, ATTR_STEP_ID, SPAN_EXPERT_STEP, Span, Telemetry

_log = logging.getLogger(__name__)


class StepServer:
    """Waits for headers in a blocking read; what ends a step early is the mesh's business, anything else ends it."""

    def __init__(self, mesh: ClusterMesh, telemetry: Telemetry) -> None:
        self._mesh, self._telemetry = mesh, telemetry
        self._headers: queue.SimpleQueue[StepHeader | None] = queue.SimpleQueue()
        self._busy_s = 0.0
        self.failure: ReplicaLost | None = None
        self._thread = threading.Thread(target=self._run, name="expert-steps", daemon=True)
        mesh.start(self._headers.put)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._headers.put(None)
        self._thread.join(timeout=10.0)

    def take_busy_s(self) -> float:
        """Seconds that steps measured in computing rows since the last call; on a GPU its experts know them."""
        busy, self._busy_s = self._busy_s, 0.0
        return busy

    def _run(self) -> None:
        use_batch_scheduling()
        try:
            while (header := self._headers.get()) is not None:
                self._take_part(header)
        except Exception as error:
            _log.exception("the serving thread failed; this shard serves no more")
            self.failure = ReplicaLost(f"the serving thread of this shard failed: {describe_error(error)}")
            self._mesh.close()  # peers see a lost peer at once, not a time-out

    def _take_part(self, header: StepHeader) -> None:
        telemetry = self._telemetry
        span = telemetry.start(SPAN_EXPERT_STEP, header.traceparent) if header.traceparent else Span()
        try:
            step = self._mesh.enter(header)
            step.serve()
        except (ExchangeError, EpochError) as error:
            # The mesh has told the leader and the Conductor; the next epoch replays the step.
            _log.warning("step %d ended early: %s", header.step_id, error)
            span.end(error)
            return
        self._busy_s += step.expert_s
        span.set(ATTR_STEP_ID, header.step_id)
        span.set(ATTR_EPOCH, header.epoch)
        span.end()
