"""The control channel: bids, reports and step headers between the members of an epoch and its leader. Plain TCP.

Every attention member listens on the configured interface; members of an epoch connect to its leader. Both sides prove
that they know the cluster token (`handshake.py`) before a frame is read; frames are length-prefixed fixed structs,
never pickle. One blocking reader thread per connection: an idle cluster costs nothing, and a header needs one wake-up
from the leader's `sendall` to the member. A send happens in the caller's thread, never through a queue."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from enum import IntEnum

from ..errors import ExpertMeshError, ReplicaLost, Unauthenticated
from .handshake import answer, challenge, receive_exactly
from .leader import BidPlaced, StepDone

_FRAME = struct.Struct("!IB")  # payload bytes, kind
_BID = struct.Struct("!IIQ?")  # decode tokens, prefill tokens, after_step, whole; the traceparent follows
_DONE = struct.Struct("!Q?")  # step id, failed
_MAX_FRAME_BYTES = 1 << 20
_HANDSHAKE_S = 5.0
_SEND_S = 5.0  # a peer that takes no byte of a 100-byte frame for so long is lost


class Kind(IntEnum):
    BID = 1
    DONE = 2
    HEADER = 3


OnFrame = Callable[[str, Kind, bytes], None]  # (peer's member id, kind, payload), in the reader's thread
OnLost = Callable[[str], None]  # (peer's member id)


def encode_bid(bid: BidPlaced) -> bytes:
    return _BID.pack(bid.num_decode, bid.num_prefill, bid.after_step, bid.whole) + bid.traceparent.encode()


def decode_bid(member_id: str, payload: bytes) -> BidPlaced:
    num_decode, num_prefill, after_step, whole = _BID.unpack_from(payload)
    return BidPlaced(member_id, num_decode, num_prefill, after_step, payload[_BID.size :].decode(), whole)


def encode_done(done: StepDone) -> bytes:
    return _DONE.pack(done.step_id, done.failed)


def decode_done(member_id: str, payload: bytes) -> StepDone:
    return StepDone(member_id, *_DONE.unpack(payload))


class Channel:
    """One authenticated connection. `send` may be called from any thread."""

    def __init__(self, sock: socket.socket, peer_id: str, on_frame: OnFrame, on_lost: OnLost) -> None:
        self.peer_id = peer_id
        self._sock, self._on_frame, self._on_lost = sock, on_frame, on_lost
        self._send_lock = threading.Lock()
        self._closed = False
        sock.settimeout(None)
        _never_hang(sock)
        self._reader = threading.Thread(target=self._read, name=f"control-{peer_id}", daemon=True)

    def start(self) -> None:
        self._reader.start()

    def send(self, kind: Kind, payload: bytes) -> None:
        try:
            with self._send_lock:
                self._sock.sendall(_FRAME.pack(len(payload), kind) + payload)
        except OSError as error:
            self._sock.close()
            raise ReplicaLost(f"control channel to {self.peer_id!r} is broken: {error}") from error

    def close(self) -> None:
        self._closed = True
        _shut(self._sock)
        if self._reader.is_alive() and self._reader is not threading.current_thread():
            self._reader.join(timeout=_HANDSHAKE_S)

    def _read(self) -> None:
        try:
            while True:
                size, kind = _FRAME.unpack(receive_exactly(self._sock, _FRAME.size))
                if size > _MAX_FRAME_BYTES:
                    raise ConnectionError(f"frame of {size} bytes")
                payload = receive_exactly(self._sock, size)
                self._on_frame(self.peer_id, Kind(kind), payload)
        except (OSError, ValueError, struct.error, ExpertMeshError):
            _shut(self._sock)
        if not self._closed:
            self._on_lost(self.peer_id)


class ControlServer:
    """Accepts the members of epochs that this process leads; the newest connection of a member id replaces the
    older."""

    def __init__(self, own_id: str, interface: str, cluster_token: str, on_frame: OnFrame, on_lost: OnLost) -> None:
        self._own_id, self._token = own_id, cluster_token.encode()
        self._on_frame, self._on_lost = on_frame, on_lost
        self._channels: dict[str, Channel] = {}
        self._lock = threading.Lock()
        self._listener = socket.create_server((interface, 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name="control-accept", daemon=True)
        self._acceptor.start()

    def send(self, member_id: str, kind: Kind, payload: bytes) -> None:
        with self._lock:
            channel = self._channels.get(member_id)
        if channel is None:
            raise ReplicaLost(f"member {member_id!r} has no control channel here")
        channel.send(kind, payload)

    def close(self) -> None:
        _shut(self._listener)
        with self._lock:
            channels = list(self._channels.values())
            self._channels.clear()
        for channel in channels:
            channel.close()
        self._acceptor.join(timeout=_HANDSHAKE_S)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._welcome, args=(sock,), name="control-hello", daemon=True).start()

    def _welcome(self, sock: socket.socket) -> None:
        try:
            sock.settimeout(_HANDSHAKE_S)
            peer_id = challenge(sock, self._token)
        except (OSError, ValueError, Unauthenticated):
            _shut(sock)
            return
        channel = Channel(sock, peer_id, self._on_frame, self._lost)
        with self._lock:
            older = self._channels.get(peer_id)
            self._channels[peer_id] = channel
        if older is not None:
            older.close()
        # The last word of the handshake goes out after the registration: a member that is connected can be sent to.
        try:
            sock.sendall(b"\x01")
        except OSError:
            _shut(sock)
        channel.start()

    def _lost(self, peer_id: str) -> None:
        with self._lock:
            known = self._channels.pop(peer_id, None)
        if known is not None:
            self._on_lost(peer_id)


def connect(
    own_id: str, host: str, port: int, *, interface: str, cluster_token: str, on_frame: OnFrame, on_lost: OnLost
) -> Channel:
    """Connect to a leader's ControlServer. The channel's peer_id is `host:port`."""
    sock = socket.create_connection((host, port), timeout=_HANDSHAKE_S, source_address=(interface, 0))
    try:
        answer(sock, cluster_token.encode(), own_id)
    except (OSError, ValueError) as error:
        _shut(sock)
        raise Unauthenticated(f"control channel at {host}:{port} refused {own_id!r}: wrong cluster token?") from error
    except Unauthenticated:
        _shut(sock)
        raise
    channel = Channel(sock, f"{host}:{port}", on_frame, on_lost)
    channel.start()
    return channel


def _never_hang(sock: socket.socket) -> None:
    """Small frames at once; a send that a hung peer does not take ends after _SEND_S, reads wait for ever."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(_SEND_S), 0))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _shut(sock: socket.socket) -> None:
    """Close, waking a thread that is blocked in it."""
    with contextlib.suppress(OSError):  # never connected, or gone already
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
