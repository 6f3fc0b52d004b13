"""Request spans of the attention tier: one each, under the caller's trace, closed however the request ends."""

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from expertmesh.cluster.request_spans import RequestSpans
from expertmesh.config import TelemetryConfig
from expertmesh.errors import QueueFull
from expertmesh.request import EngineLoad, EngineRequest, FinishReason, RequestOutput, SamplingParams
from expertmesh.telemetry import SPAN_ATTENTION, configure

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = f"00-{TRACE}-b7ad6b7169203331-01"


class SmallEngine:
    """Takes one request, refuses the next."""

    def __init__(self) -> None:
        self.taken: list[EngineRequest] = []

    def submit(self, request: EngineRequest) -> None:
        if self.taken:
            raise QueueFull("one at a time")
        self.taken.append(request)

    def abort(self, request_id: str) -> None: ...

    def load(self) -> EngineLoad:
        return EngineLoad(1, 0, 0, 1)


def test_every_request_has_one_closed_span_under_the_callers_trace():
    exporter, engine = InMemorySpanExporter(), SmallEngine()
    telemetry = configure(TelemetryConfig(), role="attention", instance="a", span_exporter=exporter)
    published: list[RequestOutput] = []
    spans = RequestSpans(telemetry, published.extend).around(engine)
    request = EngineRequest(request_id="r1", prompt_ids=(1,), sampling=SamplingParams(max_tokens=2), traceparent=CALLER)
    spans.submit(request)
    with pytest.raises(QueueFull):
        spans.submit(EngineRequest(request_id="r2", prompt_ids=(1,), sampling=SamplingParams(), traceparent=CALLER))
    spans.publish([RequestOutput("r1", [5])])
    assert spans.num_open == 1
    spans.publish([RequestOutput("r1", [6], finish_reason=FinishReason.LENGTH)])
    assert spans.num_open == 0
    refused, served = exporter.get_finished_spans()
    assert {span.name for span in (refused, served)} == {SPAN_ATTENTION}
    assert {format(span.context.trace_id, "032x") for span in (refused, served)} == {TRACE}
    assert (refused.status.is_ok, served.attributes["expertmesh.finish_reason"]) == (False, "LENGTH")
    own = f"00-{TRACE}-{served.context.span_id:016x}-01"
    assert engine.taken[0].traceparent == own
    assert [o.token_ids for o in published] == [[5], [6]]
