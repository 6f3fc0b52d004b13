"""Spans nest across processes by traceparent, metrics reach the Prometheus endpoint, and off means off."""

import urllib.request

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from expertmesh import telemetry
from expertmesh.config import TelemetryConfig


def test_spans_nest_by_traceparent_and_link_the_other_requests():
    exporter = InMemorySpanExporter()
    tracer = telemetry.configure(TelemetryConfig(), role="gateway", instance="g0", span_exporter=exporter)
    request = tracer.start(telemetry.SPAN_REQUEST, attributes={telemetry.ATTR_REQUEST_ID: "r1"})
    other = tracer.start(telemetry.SPAN_REQUEST)
    step = tracer.start(telemetry.SPAN_STEP, request.traceparent, links=[other.traceparent])
    with tracer.span(telemetry.SPAN_EXPERT_STEP, step.traceparent):
        pass
    for span in (step, other, request):
        span.end()
    spans = {s.name: s for s in exporter.get_finished_spans() if s.name != telemetry.SPAN_REQUEST}
    first = next(s for s in exporter.get_finished_spans() if telemetry.ATTR_REQUEST_ID in s.attributes)
    assert spans[telemetry.SPAN_STEP].parent.span_id == first.context.span_id
    assert spans[telemetry.SPAN_EXPERT_STEP].parent.span_id == spans[telemetry.SPAN_STEP].context.span_id
    assert {s.context.trace_id for s in spans.values()} == {first.context.trace_id}
    assert len(spans[telemetry.SPAN_STEP].links) == 1


def test_metrics_are_served_to_prometheus():
    meter = telemetry.configure(TelemetryConfig(), role="attention", instance="a0", metrics_port=0)
    meter.record(telemetry.METRIC_TTFT, 0.02)
    meter.record(telemetry.METRIC_TOKENS, 7, kind="prompt")
    meter.watch([telemetry.Gauge(telemetry.METRIC_KV_USED, lambda: 5)])
    text = urllib.request.urlopen(f"http://127.0.0.1:{meter.metrics_port}/metrics", timeout=5).read().decode()
    assert f'{telemetry.METRIC_TOKENS}_total{{kind="prompt"' in text
    assert f"{telemetry.METRIC_TTFT}_bucket" in text
    assert f"{telemetry.METRIC_KV_USED}" in text
    meter.shutdown()


def test_off_records_nothing_and_gives_no_traceparent():
    off = telemetry.configure(TelemetryConfig(), role="gateway", instance="g0")
    assert not off.tracing
    assert not off.metering
    assert off.start(telemetry.SPAN_REQUEST).traceparent == ""
    off.record(telemetry.METRIC_TTFT, 1.0)
