"""The attacks of `fuzz.py`: each makes one case from a seed, at a live gateway, and says what is wrong with the answer.

An answer is right if it is a proper stream (started first, offsets without a gap, finished last, usage within
max_tokens) or a status of our error tree with its details. INTERNAL, UNKNOWN, a status without details, a call that
hangs and a stream that ends early without a status are findings."""

import asyncio
import contextlib
import gc
from collections import Counter
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import grpc
import grpc.aio

from ..proto import expertmesh_pb2 as pb
from ..router.gateway.link import TOKEN_KEY
from ..router.gateway.rpc_errors import DETAILS_KEY, DOMAIN, RETRY_KEY
from .fuzz_http2 import hostile_connection
from .fuzz_requests import SESSION_IDS, mutated, nested_groups, odd_message, valid_request
from .fuzz_server import API_KEYS, CLUSTER_TOKEN

HANG_S = 120.0  # nothing here takes so long, even on a busy machine
PACKAGE = pb.DESCRIPTOR.package
METHODS = {  # path -> (request class, answers with a stream)
    f"/{PACKAGE}.{service.name}/{method.name}": (getattr(pb, method.input_type.name), method.server_streaming)
    for service in pb.DESCRIPTOR.services_by_name.values()
    if service.name != "Link"
    for method in service.methods
}
FOREIGN = {  # path -> answers with a stream: grpc's own services, and what there is not
    "/grpc.health.v1.Health/Check": False,
    "/grpc.health.v1.Health/Watch": True,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": True,
    f"/{PACKAGE}.Generation/Nothing": False,
    f"/{PACKAGE}.Link/Open": True,
}
BARE = {  # what gRPC itself or the client's own doing answers, without our details
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNIMPLEMENTED,
}
TRANSPORT_LIMITS = ("larger than max", "metadata size", "Sent message larger")


class Finding(Exception):
    """Something that must not be. The message says what."""


class Target:
    """The gateway under attack: its address, channels to it, and what it answered so far."""

    def __init__(self, address: str, num_channels: int = 3) -> None:
        self.address = address
        self.answers: Counter[str] = Counter()  # by status name; OK is a whole answer
        self._channels = [self._dial() for _ in range(num_channels)]

    def channel(self, rng: Random) -> grpc.aio.Channel:
        return rng.choice(self._channels)

    async def redial(self, rng: Random) -> None:
        """Drop one connection with all that runs on it."""
        i = rng.randrange(len(self._channels))
        old, self._channels[i] = self._channels[i], self._dial()
        await old.close()

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()
        self._channels.clear()
        gc.collect()  # a connection lives as long as a call object that used it

    def _dial(self) -> grpc.aio.Channel:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", 64 << 20)]
        return grpc.aio.insecure_channel(self.address, options=options)


def credentials(rng: Random) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {rng.choice(list(API_KEYS))}")]


async def call(
    target: Target, rng: Random, path: str, data: bytes, *, streams: bool, metadata: Any, timeout_s: float = HANG_S
) -> list[bytes] | None:
    """All answers of one call; None after a status that is right. Finding: one that is not."""
    channel = target.channel(rng)
    try:
        if streams:
            stream = channel.unary_stream(path)(data, metadata=metadata, timeout=timeout_s)
            found = [message async for message in stream]
        else:
            found = [await channel.unary_unary(path)(data, metadata=metadata, timeout=timeout_s)]
    except grpc.aio.AioRpcError as error:
        check_status(target, error, foreign=path in FOREIGN, short=timeout_s < HANG_S)
        return None
    target.answers["OK"] += 1
    return found


def check_status(target: Target, error: grpc.aio.AioRpcError, *, foreign: bool = False, short: bool = False) -> None:
    code, text = error.code(), error.details() or ""
    target.answers[code.name] += 1
    if code in BARE or (short and code is grpc.StatusCode.DEADLINE_EXCEEDED):
        return
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and any(part in text for part in TRANSPORT_LIMITS):
        return
    if foreign and code is grpc.StatusCode.NOT_FOUND:
        return
    metadata = dict(error.trailing_metadata() or ())
    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED):
        raise Finding(f"{code.name}: {text}")
    if DOMAIN.encode() not in bytes(metadata.get(DETAILS_KEY, b"")) or not text:
        raise Finding(f"{code.name} without details: {text!r}")
    if code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE) and RETRY_KEY not in metadata:
        raise Finding(f"{code.name} without a retry delay: {text!r}")


def check_events(events: list[pb.GenerateEvent], *, first: int = 0, whole: bool, max_tokens: int = 0) -> None:
    """`whole`: the stream ended by itself."""
    offsets = [e.offset for e in events]
    if offsets != list(range(first, first + len(events))):
        raise Finding(f"offsets {offsets[:20]} from {first}")
    kinds = [e.WhichOneof("event") for e in events]
    if None in kinds or (not first and events and kinds[0] != "started") or "started" in kinds[not first :]:
        raise Finding(f"events {kinds[:20]}")
    if "finished" in kinds[:-1] or (whole and (not kinds or kinds[-1] != "finished")):
        raise Finding(f"a stream that ended without a status: {kinds[-5:]}")
    if whole and max_tokens and events[-1].finished.usage.completion_tokens > max_tokens:
        raise Finding(f"{events[-1].finished.usage.completion_tokens} tokens of {max_tokens}")


# ---------------------------------------------------------------- the attacks


async def raw_bytes(rng: Random, target: Target) -> None:
    """Bytes that are no message, or hardly, at any method."""
    path = rng.choice((*METHODS, *FOREIGN)) if rng.random() < 0.5 else f"/{PACKAGE}.Generation/Generate"
    request_class, streams = METHODS.get(path, (pb.GetSessionRequest, FOREIGN.get(path, False)))
    if rng.random() < 0.1:
        data = nested_groups(rng)
    elif request_class is pb.GenerateRequest:
        data = mutated(rng, valid_request(rng).SerializeToString())
    else:
        data = mutated(rng, odd_message(rng, request_class(), 2).SerializeToString())
    await call(target, rng, path, data, streams=streams, metadata=credentials(rng), timeout_s=_patience(path))


async def odd_fields(rng: Random, target: Target) -> None:
    """Messages that parse and say odd things."""
    path = rng.choice(list(METHODS)) if rng.random() < 0.4 else f"/{PACKAGE}.Generation/Generate"
    request_class, streams = METHODS[path]
    message = valid_request(rng) if request_class is pb.GenerateRequest else request_class()
    data = odd_message(rng, message, rng.choice((1, 1, 2, 3))).SerializeToString()
    found = await call(target, rng, path, data, streams=streams, metadata=credentials(rng), timeout_s=_patience(path))
    if found is not None and request_class is pb.GenerateRequest:
        check_events([pb.GenerateEvent.FromString(m) for m in found], whole=True)


def _patience(path: str) -> float:
    """Watches end by their deadline alone."""
    return 1.0 if "atch" in path or "Reflection" in path or "Link" in path else HANG_S


async def hostile_metadata(rng: Random, target: Target) -> None:
    """Headers that a client library lets through (those that it refuses are in `raw_http2`)."""
    metadata: list[tuple[str, Any]] = credentials(rng) if rng.random() < 0.6 else []
    texts = (
        "",
        " ",
        "Bearer ",
        "bearer x",
        "Bearer " + "x" * 4000,
        "~" * 300,
        "00-" + "0" * 32 + "-" + "0" * 16 + "-01",
    )
    texts += ("00-zz-zz-zz", "ff-" + "f" * 32 + "-" + "f" * 16 + "-ff", "99999S", "gzip", "a" * 16_000, CLUSTER_TOKEN)
    keys = (
        "authorization",
        "traceparent",
        "tracestate",
        TOKEN_KEY,
        "x-anything",
        "grpc-trace-bin",
        "x-b-bin",
        "baggage",
    )
    for _ in range(rng.choice((1, 2, 5, 50))):
        key = rng.choice(keys)
        metadata.append((key, rng.randbytes(rng.choice((0, 1, 500))) if key.endswith("-bin") else rng.choice(texts)))
    path = rng.choice(list(METHODS))
    request_class, streams = METHODS[path]
    request = valid_request(rng) if request_class is pb.GenerateRequest else request_class()
    await call(
        target, rng, path, request.SerializeToString(), streams=streams, metadata=metadata, timeout_s=_patience(path)
    )


async def huge(rng: Random, target: Target) -> None:
    """Large in one dimension."""
    n = rng.choice((100, 5000, 60_000))
    request = pb.GenerateRequest(sampling=pb.SamplingOptions(max_tokens=2))
    makers: tuple[Callable[[], Any], ...] = (
        lambda: setattr(request, "prompt", rng.choice(("a", "你", "<|im_start|>", " \n")) * n),
        lambda: request.token_ids.ids.extend([5] * n),
        lambda: request.chat.messages.extend([pb.Message(role="user", content="x")] * n),
        lambda: request.chat.messages.add(role="user", content=rng.choice(("a" * 20 * n, "é " * n, "\x00" * n))),
        lambda: request.chat.messages.add(role="assistant", tool_calls=[pb.ToolCall(name="t")] * n),
        lambda: (request.chat.messages.add(role="user", content="x"), request.tools.extend([pb.Tool(name="t")] * n)),
        lambda: (setattr(request, "prompt", "x"), request.sampling.stop.extend(["x" * (n % 300 + 1)] * n)),
        lambda: (setattr(request, "prompt", "x"), request.sampling.stop_token_ids.extend(range(n))),
    )
    rng.choice(makers)()
    path, data = f"/{PACKAGE}.Generation/Generate", request.SerializeToString()
    await call(target, rng, path, data, streams=True, metadata=credentials(rng))


async def cancelled_stream(rng: Random, target: Target) -> None:
    """A request that is served, left in one of the ways there are, sometimes resumed."""
    request, metadata = valid_request(rng), credentials(rng)
    ending = rng.choice(("read", "read", "read", "leave", "leave", "deadline", "cancel", "redial"))
    timeout_s = rng.choice((0.001, 0.05, 0.3)) if ending == "deadline" else HANG_S
    num_events = rng.choice((0, 1, 2, 5, 15))
    stub = target.channel(rng).unary_stream(f"/{PACKAGE}.Generation/Generate", pb.GenerateRequest.SerializeToString)
    stream = stub(request, metadata=metadata, timeout=timeout_s)
    events: list[pb.GenerateEvent] = []
    whole = False
    try:
        while ending in ("read", "deadline") or len(events) < num_events:
            data = await stream.read()
            if data is grpc.aio.EOF:
                whole = True
                break
            events.append(pb.GenerateEvent.FromString(data))
        if not whole and ending == "cancel" and request.request_id:
            cancel = pb.CancelRequest(request_id=request.request_id).SerializeToString()
            path = f"/{PACKAGE}.Generation/Cancel"
            await call(target, rng, path, cancel, streams=False, metadata=metadata)
        elif not whole and ending == "redial" and rng.random() < 0.2:
            await target.redial(rng)
    except grpc.aio.AioRpcError as error:
        check_status(target, error, short=ending == "deadline")
    except asyncio.CancelledError:  # grpc.aio: the call was cancelled under us by a channel that somebody closed
        target.answers["CANCELLED"] += 1
        current = asyncio.current_task()
        if current is not None and current.cancelling():
            raise
    finally:
        stream.cancel()
    target.answers["OK" if whole else "left"] += 1
    check_events(events, whole=whole, max_tokens=request.sampling.max_tokens)
    ended = bool(events) and events[-1].WhichOneof("event") == "finished"
    if request.resumable and not whole and not ended and rng.random() < 0.7:
        await _resume(rng, target, request.request_id, len(events), metadata)


async def _resume(rng: Random, target: Target, request_id: str, offset: int, metadata: Any) -> None:
    data = pb.ResumeRequest(request_id=request_id, from_offset=offset).SerializeToString()
    found = await call(target, rng, f"/{PACKAGE}.Generation/Resume", data, streams=True, metadata=metadata)
    if found is not None:
        check_events([pb.GenerateEvent.FromString(m) for m in found], first=offset, whole=True)


async def session_calls(rng: Random, target: Target) -> None:
    """The Sessions service on few ids, so that calls meet."""
    ids = rng.choices(SESSION_IDS, k=2)
    requests: dict[str, Any] = {
        "Get": pb.GetSessionRequest(session_id=ids[0]),
        "List": pb.ListSessionsRequest(page_size=rng.choice((0, 1, 3, 500))),
        "Delete": pb.DeleteSessionRequest(session_id=ids[0]),
        "Fork": pb.ForkSessionRequest(session_id=ids[0], new_session_id=ids[1], at_version=rng.choice((0, 1, 9))),
        "Export": pb.ExportSessionRequest(session_id=ids[0]),
    }
    name = rng.choice(list(requests))
    data = requests[name].SerializeToString()
    await call(target, rng, f"/{PACKAGE}.Sessions/{name}", data, streams=False, metadata=credentials(rng))


async def raw_http2(rng: Random, target: Target) -> None:
    """Frames by hand, and what is no HTTP/2 at all."""
    with contextlib.suppress(OSError):
        request = valid_request(rng).SerializeToString()
        await hostile_connection(rng, target.address, request, rng.choice(list(API_KEYS)))
    target.answers["raw"] += 1


ATTACKS: dict[str, tuple[float, Callable[[Random, Target], Awaitable[None]]]] = {  # share of the cases
    "raw_bytes": (0.25, raw_bytes),
    "odd_fields": (0.25, odd_fields),
    "hostile_metadata": (0.1, hostile_metadata),
    "huge": (0.05, huge),
    "cancelled_stream": (0.2, cancelled_stream),
    "session_calls": (0.05, session_calls),
    "raw_http2": (0.1, raw_http2),
}
