"""Hostile bytes for a gRPC port: HTTP/2 by hand (RFC 9113, RFC 7541), right enough to come far, then wrong.

A gRPC library refuses to send what is malformed, so frames, header blocks (literals without indexing, no Huffman code)
and gRPC's own framing are written here. One case = one connection; what the server says is read and thrown away."""

import asyncio
import contextlib
import struct
from collections.abc import Callable
from random import Random

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS = 1, 4
PATHS = ("/expertmesh.v1.Generation/Generate", "/expertmesh.v1.Cluster/GetTopology", "/grpc.health.v1.Health/Watch")


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return (
        struct.pack(">I", len(payload))[1:] + bytes((kind & 255, flags & 255)) + struct.pack(">I", stream_id) + payload
    )


def header_block(headers: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in headers)


def grpc_message(data: bytes, *, compressed: int = 0, length: int | None = None) -> bytes:
    return struct.pack(">BI", compressed, len(data) if length is None else length) + data


def _text(data: bytes) -> bytes:
    """Length with a prefix of 7 bits, then the bytes."""
    n = len(data)
    if n < 127:
        return bytes((n,)) + data
    prefix, n = bytearray((127,)), n - 127
    while n > 127:
        prefix.append(n & 127 | 128)
        n >>= 7
    return bytes((*prefix, n)) + data


def call_headers(rng: Random, api_key: str) -> list[tuple[bytes, bytes]]:
    """Those of a gRPC call; now and then one is missing, doubled, wrong or hostile."""
    headers = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", rng.choice(PATHS).encode()),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"grpc-timeout", b"20S"),
        (b"authorization", f"Bearer {api_key}".encode()),
    ]
    for _ in range(rng.choice((0, 0, 1, 2, 5))):
        i = rng.randrange(len(headers))
        change: Callable[[], None] = rng.choice(
            (
                lambda i=i: headers.pop(i) and None if len(headers) > 1 else None,
                lambda i=i: headers.append(headers[i]),
                lambda i=i: headers.__setitem__(i, (headers[i][0], _hostile(rng))),
                lambda: headers.insert(rng.randrange(len(headers)), (_hostile(rng), _hostile(rng))),
                lambda: headers.append((rng.choice((b"traceparent", b"x-bin", b"grpc-encoding")), _hostile(rng))),
            )
        )
        change()
        if not headers:
            break
    return headers


def _hostile(rng: Random) -> bytes:
    return rng.choice(
        (
            b"",
            b"\x00",
            b"\r\nx: y",
            b"\xff\xfe",
            b"../../etc",
            b"%00%ff",
            b"9" * 40,
            b"A" * rng.choice((100, 5000, 20_000)),
            rng.randbytes(rng.randrange(1, 60)),
            "é你👩".encode(),
        )
    )


def connection_bytes(rng: Random, request: bytes, api_key: str) -> list[bytes]:
    """What one connection sends, in pieces."""
    kind = rng.randrange(8)
    if kind == 0:  # not HTTP/2
        return [
            rng.choice((b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", rng.randbytes(400), b""))
        ]
    if kind == 1:  # half a preface, or one and then noise
        return [PREFACE[: rng.randrange(len(PREFACE) + 1)], rng.randbytes(rng.randrange(300))]
    pieces = [PREFACE + frame(SETTINGS, 0, 0)]
    body = grpc_message(
        request if rng.random() < 0.7 else rng.randbytes(rng.randrange(200)),
        compressed=rng.choice((0, 0, 0, 1, 7)),
        length=rng.choice((None, None, None, 0, 3, 1 << 20, (1 << 32) - 1)),
    )
    for index in range(rng.randrange(1, 6)):
        stream_id = rng.choice((2 * index + 1, 2 * index + 1, 2 * index + 1, 0, 2, (1 << 31) - 1))
        block = header_block(call_headers(rng, api_key))
        if rng.random() < 0.2:
            block = rng.randbytes(len(block) % 97)
        half = rng.randrange(len(block) + 1) if rng.random() < 0.2 else len(block)
        pieces.append(frame(HEADERS, END_HEADERS if half == len(block) else 0, stream_id, block[:half]))
        if half < len(block):
            pieces.append(frame(CONTINUATION, rng.choice((END_HEADERS, 0)), stream_id, block[half:]))
        if rng.random() < 0.8:
            cut = rng.randrange(len(body) + 1) if rng.random() < 0.3 else len(body)
            pieces.append(frame(DATA, rng.choice((END_STREAM, END_STREAM, 0)), stream_id, body[:cut]))
        if rng.random() < 0.4:
            pieces.append(_odd_frame(rng, stream_id))
    return pieces


def _odd_frame(rng: Random, stream_id: int) -> bytes:
    kind = rng.choice(
        (PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION, 11, 200)
    )
    payload = {
        RST_STREAM: struct.pack(">I", rng.choice((0, 8, 1 << 31))),
        SETTINGS: struct.pack(">HI", rng.randrange(8), rng.choice((0, 1, 1 << 14, (1 << 32) - 1))),
        WINDOW_UPDATE: struct.pack(">I", rng.choice((0, 1, (1 << 31) - 1))),
        PING: rng.randbytes(8),
        GOAWAY: struct.pack(">II", rng.randrange(1 << 31), 0),
    }.get(kind, b"")
    if rng.random() < 0.3:
        payload = rng.randbytes(rng.randrange(40))
    return frame(kind, rng.choice((0, 1, 4, 255)), rng.choice((0, stream_id)), payload)


async def hostile_connection(rng: Random, address: str, request: bytes, api_key: str) -> None:
    """One connection from its bytes to its end: closed, half-closed first, reset, or left for a while."""
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        with contextlib.suppress(OSError):  # reset, or not connected any more
            for piece in connection_bytes(rng, request, api_key):
                writer.write(piece)
                await writer.drain()
                if rng.random() < 0.2:
                    await asyncio.sleep(rng.random() * 0.02)
            ending = rng.randrange(4)
            if ending == 0 and writer.can_write_eof():
                writer.write_eof()
            if ending < 3:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(rng.choice((0.0, 0.05, 0.5))):
                        while await reader.read(1 << 16):
                            pass
    finally:
        transport = writer.transport
        transport.abort() if rng.random() < 0.5 else writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(5):
                await writer.wait_closed()
        transport.abort()  # what it could not flush would keep it open
