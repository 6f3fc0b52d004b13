"""One span a request in the attention tier: opened when the link submits it, closed when its last token is published.

It stands between the link and the engine and exists only where tracing is on, so that the engine knows nothing of
spans. The engine sees the new span's `traceparent`, which makes its steps children of the request here."""

import threading
from collections.abc import Callable
from dataclasses import replace

from ..request import EngineLoad, EngineRequest, RequestOutput
from ..router.gateway.link import EngineHandle
from ..telemetry import ATTR_FINISH, ATTR_REQUEST_ID, SPAN_ATTENTION, Span, Telemetry

Publish = Callable[[list[RequestOutput]], None]


class RequestSpans:
    """An EngineHandle around another one. Give `publish` to the engine and the object to the link."""

    def __init__(self, telemetry: Telemetry, publish: Publish) -> None:
        self._telemetry, self._publish = telemetry, publish
        self._engine: EngineHandle | None = None
        self._lock = threading.Lock()
        self._spans: dict[str, Span] = {}

    def around(self, engine: EngineHandle) -> "RequestSpans":
        self._engine = engine
        return self

    @property
    def num_open(self) -> int:
        return len(self._spans)

    def submit(self, request: EngineRequest) -> None:
        assert self._engine is not None
        span = self._telemetry.start(SPAN_ATTENTION, request.traceparent, {ATTR_REQUEST_ID: request.request_id})
        with self._lock:
            self._spans[request.request_id] = span
        try:
            self._engine.submit(replace(request, traceparent=span.traceparent))
        except Exception as error:
            self._take(request.request_id).end(error)
            raise

    def abort(self, request_id: str) -> None:
        assert self._engine is not None
        self._engine.abort(request_id)

    def load(self) -> EngineLoad:
        assert self._engine is not None
        return self._engine.load()

    def publish(self, outputs: list[RequestOutput]) -> None:
        """From the engine thread, once a step."""
        self._publish(outputs)
        for output in outputs:
            if output.finish_reason:
                span = self._take(output.request_id)
                span.set(ATTR_FINISH, output.error_code or output.finish_reason.name)
                span.end()

    def _take(self, request_id: str) -> Span:
        with self._lock:
            return self._spans.pop(request_id, Span())
