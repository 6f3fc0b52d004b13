"""grpc's own services (health, reflection) in our server: what they cannot read is an InvalidRequest like elsewhere.

Their generated handlers leave bytes that are no message to grpc, which answers UNKNOWN and logs a traceback for each.
So the handlers are caught while they are registered, and wrapped."""

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from ...errors import InvalidRequest

AsStatus = Callable[[grpc.aio.ServicerContext], Any]  # an error of the tree inside it becomes a status


def add_foreign_services(
    server: grpc.aio.Server, servicer: health.aio.HealthServicer, services: tuple[str, ...], as_status: AsStatus
) -> None:
    """`services`: full names that reflection tells of, besides these two."""
    caught = _Caught()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, caught)
    names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflection.aio.ReflectionServicer(names), caught)
    for service, methods in caught.methods.items():
        wrapped = {name: _wrap(method, as_status) for name, method in methods.items()}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, wrapped),))


class _Caught:
    """Looks like a server to grpc's registering functions."""

    def __init__(self) -> None:
        self.methods: dict[str, Mapping[str, grpc.RpcMethodHandler]] = {}

    def add_registered_method_handlers(self, service: str, methods: Mapping[str, grpc.RpcMethodHandler]) -> None:
        self.methods[service] = methods

    def add_generic_rpc_handlers(self, _handlers: Any) -> None:
        """The same methods in another form."""


def _wrap(method: Any, as_status: AsStatus) -> grpc.RpcMethodHandler:
    encode = method.response_serializer

    def read(data: bytes) -> Any:
        try:
            return method.request_deserializer(data)
        except DecodeError as error:
            raise InvalidRequest("request", f"{len(data)} bytes", f"a message of this method: {error}") from None

    if method.unary_unary is not None:

        async def unary(data: bytes, context: grpc.aio.ServicerContext) -> Any:
            async with as_status(context):
                return await method.unary_unary(read(data), context)

        return grpc.unary_unary_rpc_method_handler(unary, response_serializer=encode)
    if method.unary_stream is not None:

        async def stream(data: bytes, context: grpc.aio.ServicerContext) -> None:
            async with as_status(context):
                await method.unary_stream(read(data), context)

        return grpc.unary_stream_rpc_method_handler(stream, response_serializer=encode)

    async def both(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        async def requests() -> AsyncIterator[Any]:
            async for data in messages:
                yield read(data)

        async with as_status(context):
            async for response in method.stream_stream(requests(), context):
                yield response

    return grpc.stream_stream_rpc_method_handler(both, response_serializer=encode)
