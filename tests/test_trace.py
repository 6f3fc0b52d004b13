"""One trace goes from the gateway through attention and step to the expert shards: real processes, real OTLP."""

import threading
from concurrent import futures
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from expertmesh import telemetry
from expertmesh.client import Client
from expertmesh.cluster.app import Cluster
from expertmesh.config import CacheConfig, ClusterConfig, NetworkConfig, TelemetryConfig

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_runtime")]

CHAIN = (telemetry.SPAN_REQUEST, telemetry.SPAN_ATTENTION, telemetry.SPAN_STEP)


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """An OTLP end point that keeps spans by trace and wakes who waits for a whole trace."""

    def __init__(self):
        self.changed = threading.Condition()
        self.spans: dict[bytes, list[tuple[str, str]]] = {}  # trace id -> (process role, span name)

    def Export(self, request, _context):
        with self.changed:
            for resource in request.resource_spans:
                service = next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
                for span in (s for scope in resource.scope_spans for s in scope.spans):
                    self.spans.setdefault(span.trace_id, []).append((service, span.name))
            self.changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def has_whole_trace(self) -> bool:
        return any({name for _, name in spans} >= {*CHAIN, telemetry.SPAN_EXPERT_STEP} for spans in self.spans.values())


def test_one_trace_reaches_every_tier(tiny_checkpoint: Path):
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    config = ClusterConfig(
        model=str(tiny_checkpoint),
        network=NetworkConfig(gateway_port=0),
        cache=CacheConfig(kv_memory_bytes=16 << 20),
        telemetry=replace(TelemetryConfig(), otlp_endpoint=f"http://127.0.0.1:{port}"),
    )
    try:
        with Cluster(config) as cluster, Client(cluster.gateways) as client:
            for _ in client.generate(token_ids=[1, 2, 3], temperature=0.0, max_tokens=4, ignore_eos=True):
                pass
            with collector.changed:
                assert collector.changed.wait_for(collector.has_whole_trace, timeout=30), collector.spans
    finally:
        server.stop(0)
