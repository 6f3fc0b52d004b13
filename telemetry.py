"""Every span and metric name of expertmesh, and the one object that a process records them with.

One trace goes client -> gateway request -> attention request -> step -> expert step: the W3C `traceparent` travels in
gRPC metadata, in `Submit` on the link, and in the step header. Spans are per request and per step, never per token or
layer. Metrics are OpenTelemetry instruments read by Prometheus. Both are off by default: `Telemetry.off()` answers each
call with one check, so callers never test for it. opentelemetry is imported only when something is switched on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .config import TelemetryConfig

SPAN_REQUEST = "expertmesh.request"  # gateway: one Generate call
SPAN_ATTENTION = "expertmesh.attention"  # attention replica: one request from submit to finish
SPAN_STEP = "expertmesh.step"  # attention replica: one step of a batch; links to the other requests in it
SPAN_EXPERT_STEP = "expertmesh.expert_step"  # expert owner: one step's turns of all layers

METRIC_TTFT = "expertmesh_time_to_first_token_seconds"
METRIC_TTFA = "expertmesh_time_to_first_answer_token_seconds"
METRIC_INTER_TOKEN = "expertmesh_inter_token_seconds"
METRIC_QUEUE = "expertmesh_queue_seconds"
METRIC_REQUESTS = "expertmesh_requests"  # by finish reason or error code
METRIC_TOKENS = "expertmesh_tokens"  # by kind: prompt, cached, completion, reasoning
METRIC_STEP = "expertmesh_step_seconds"  # by phase: schedule, forward, exchange, expert, sample
METRIC_STEP_TOKENS = "expertmesh_step_tokens"
METRIC_RUNNING = "expertmesh_running_requests"
METRIC_WAITING = "expertmesh_waiting_requests"
METRIC_KV_USED = "expertmesh_kv_blocks_used"
METRIC_KV_TOTAL = "expertmesh_kv_blocks_total"
METRIC_EXPERT_ROWS = "expertmesh_expert_rows"  # (token, expert) rows computed
METRIC_EXPERT_SECONDS = "expertmesh_expert_busy_seconds"
METRIC_BAD_ROWS = "expertmesh_bad_rows"  # exchanged rows that arrived damaged or not finite, since start
METRIC_STEP_REPLAYS = "expertmesh_step_replays"  # steps run again because of them
METRIC_WEIGHT_FAULTS = "expertmesh_weight_faults"  # damaged experts found, since start
METRIC_SCRUB_ROUND = "expertmesh_scrub_round_seconds"  # that the last round over all resident experts took
METRIC_EPOCH = "expertmesh_epoch"
METRIC_PLACEMENT = "expertmesh_placement_version"

ATTR_REQUEST_ID = "expertmesh.request_id"
ATTR_SESSION_ID = "expertmesh.session_id"
ATTR_STEP_ID = "expertmesh.step_id"
ATTR_EPOCH = "expertmesh.epoch"
ATTR_NUM_TOKENS = "expertmesh.num_tokens"
ATTR_NUM_ROWS = "expertmesh.num_rows"
ATTR_FINISH = "expertmesh.finish_reason"

SECONDS_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)

_HISTOGRAMS = {METRIC_TTFT, METRIC_TTFA, METRIC_INTER_TOKEN, METRIC_QUEUE, METRIC_STEP}


class Span:
    """One span, or nothing: `traceparent` is "" when tracing is off."""

    __slots__ = ("_span", "traceparent")

    def __init__(self, span: Any = None, traceparent: str = "") -> None:
        self._span, self.traceparent = span, traceparent

    def set(self, name: str, value: Any) -> None:
        if self._span is not None:
            self._span.set_attribute(name, value)

    def event(self, name: str, attributes: Mapping[str, Any] | None = None) -> None:
        if self._span is not None:
            self._span.add_event(name, dict(attributes or {}))

    def end(self, error: BaseException | None = None) -> None:
        if self._span is None:
            return
        if error is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR, str(error))
        self._span.end()
        self._span = None


_NO_SPAN = Span()


@dataclass(frozen=True, slots=True)
class Gauge:
    """A number read when Prometheus asks: `read() -> value`."""

    name: str
    read: Callable[[], float]


class Telemetry:
    """Spans and metrics of one process; made once by `configure` and handed down."""

    def __init__(self, tracer_provider: Any = None, meter_provider: Any = None, metrics_port: int = -1) -> None:
        self._tracer_provider, self._meter_provider = tracer_provider, meter_provider
        self._tracer = tracer_provider.get_tracer("expertmesh") if tracer_provider else None
        self._meter = meter_provider.get_meter("expertmesh") if meter_provider else None
        self._instruments: dict[str, Any] = {}
        self.metrics_port = metrics_port  # the port in force, -1 = off

    @classmethod
    def off(cls) -> "Telemetry":
        return cls()

    @property
    def tracing(self) -> bool:
        return self._tracer is not None

    @property
    def metering(self) -> bool:
        return self._meter is not None

    # ---- spans

    def start(
        self,
        name: str,
        traceparent: str = "",
        attributes: Mapping[str, Any] | None = None,
        links: Sequence[str] = (),
        *,
        started_at: float = 0.0,
    ) -> Span:
        """Begin a span under the W3C `traceparent` (a new trace where empty); the caller calls `end()`.

        `started_at` in unix seconds, 0 = now."""
        if self._tracer is None:
            return _NO_SPAN
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        parent = propagator.extract({"traceparent": traceparent}) if traceparent else None
        contexts = [
            trace.get_current_span(propagator.extract({"traceparent": t})).get_span_context() for t in links if t
        ]
        span = self._tracer.start_span(
            name,
            context=parent,
            attributes=dict(attributes or {}),
            links=[trace.Link(c) for c in contexts if c.is_valid],
            start_time=int(started_at * 1e9) or None,
        )
        carrier: dict[str, str] = {}
        propagator.inject(carrier, context=trace.set_span_in_context(span))
        return Span(span, carrier.get("traceparent", ""))

    @contextmanager
    def span(self, name: str, traceparent: str = "", **attributes: Any) -> Iterator[Span]:
        """`start` and `end` around a block; an exception marks the span."""
        span = self.start(name, traceparent, attributes)
        try:
            yield span
        except BaseException as error:
            span.end(error)
            raise
        span.end()

    # ---- metrics

    def record(self, name: str, value: float, **attributes: str) -> None:
        """Add one observation of a histogram (names in seconds) or add to a counter (all other names)."""
        if self._meter is None:
            return
        instrument = self._instruments.get(name)
        if instrument is None:
            instrument = self._instruments[name] = self._make(name)
        if name in _HISTOGRAMS or name == METRIC_STEP_TOKENS:
            instrument.record(value, attributes)
        else:
            instrument.add(value, attributes)

    def watch(self, gauges: Sequence[Gauge], **attributes: str) -> None:
        """Register numbers that are read whenever Prometheus asks."""
        if self._meter is None:
            return
        from opentelemetry.metrics import Observation

        for gauge in gauges:
            read = gauge.read
            self._meter.create_observable_gauge(
                gauge.name, callbacks=[lambda _options, read=read: [Observation(read(), attributes)]]
            )

    def _make(self, name: str) -> Any:
        assert self._meter is not None
        if name in _HISTOGRAMS:
            return self._meter.create_histogram(name, unit="s", explicit_bucket_boundaries_advisory=SECONDS_BUCKETS)
        if name == METRIC_STEP_TOKENS:
            return self._meter.create_histogram(
                name, explicit_bucket_boundaries_advisory=[float(2**i) for i in range(15)]
            )
        return self._meter.create_counter(name)

    def shutdown(self) -> None:
        """Flush and stop the exporters."""
        for provider in (self._tracer_provider, self._meter_provider):
            if provider is not None:
                provider.shutdown()


def configure(
    config: TelemetryConfig,
    *,
    role: str,
    instance: str,
    metrics_host: str = "127.0.0.1",
    metrics_port: int = -1,
    span_exporter: Any = None,
) -> Telemetry:
    """Build the process's Telemetry. `metrics_port` -1 = no metrics, 0 = a free port. `span_exporter` is for tests."""
    from_config = config.tracing or span_exporter is not None
    if not from_config and metrics_port < 0:
        return Telemetry.off()
    from opentelemetry.sdk.resources import Resource

    resource = Resource.create({"service.name": f"expertmesh-{role}", "service.instance.id": instance})
    tracer_provider = _tracer_provider(config, resource, span_exporter) if from_config else None
    meter_provider, port = (None, -1)
    if metrics_port >= 0:
        meter_provider, port = _meter_provider(resource, metrics_host, metrics_port)
    return Telemetry(tracer_provider, meter_provider, port)


def _tracer_provider(config: TelemetryConfig, resource: Any, span_exporter: Any) -> Any:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    provider = TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(config.sampling_ratio)))
    if span_exporter is not None:
        provider.add_span_processor(SimpleSpanProcessor(span_exporter))
    if config.console:
        provider.add_span_processor(BatchSpanProcessor(ConsoleSpanExporter()))
    if config.otlp_endpoint:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        insecure = not config.otlp_endpoint.startswith("https")
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(config.otlp_endpoint, insecure=insecure)))
    return provider


def _meter_provider(resource: Any, host: str, port: int) -> tuple[Any, int]:
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from opentelemetry.sdk.metrics import MeterProvider
    from prometheus_client import REGISTRY, start_http_server

    provider = MeterProvider(resource=resource, metric_readers=[PrometheusMetricReader()])
    server, _thread = start_http_server(port, addr=host, registry=REGISTRY)
    return provider, server.server_port
