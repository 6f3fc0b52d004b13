"""An expert's weights from another process's memory: `CopyServer` gives them, `PeerCopies` asks for them.

A shard that joins, that takes over a dead one's experts or that found one damaged asks the members that hold them
before it reads a disk: theirs is in memory, and it is there when the checkpoint's host is not. With an expert comes its
truth (`truth.py`), made once from the checkpoint and held against the giver's own copy before that copy was used. The
taker holds bytes and golden rows against it again, so damage on the way, in the giver's memory or in the taker's
products shows before the copy serves, and the disk is read instead. What a shard holds it says once a connection;
an expert that is gone meanwhile is a "no", no error. Nothing here is on a step's path: givers run at the lowest
priority, and every wait ends (`_SILENT_S`), with the disk as the answer.

After the handshake of `router/handshake.py`, in the roles of `_ROLES`:

    taker: fingerprint of model and dtype, 32 bytes     giver: count, then (layer, expert) of each it holds
    taker: (layer, expert)                              giver: 1 and the expert, or 0

Experts packed on a GPU are not given yet. Idea: "peer first" of weight transfer between inference engines; BitTorrent's
have-list."""

import contextlib
import hashlib
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol

import numpy as np
import torch

from ..checkpoint import Checkpoint
from ..errors import Unauthenticated
from ..router.epoch import Member
from ..router.handshake import answer, challenge, receive_exactly
from .truth import NUM_GOLDEN_ROWS, ExpertTruth, Truths, num_blocks
from .weights import LayerExperts

_ROLES = (b"expert copies: taker", b"expert copies: giver")
_COUNT, _CELL = struct.Struct("!I"), struct.Struct("!II")
_CONNECT_S, _SILENT_S = 1.0, 5.0
_IDLE_S = 60.0  # a taker that asks nothing for so long is hung up on
_SHUN_S = 30.0  # a peer that failed is not asked again for so long
_MAX_TAKERS = 64
_log = logging.getLogger(__name__)

Cell = tuple[int, int]  # layer id, logical expert


class Holder(Protocol):
    """What a giver needs of `LocalExpertMLP`."""

    truths: Truths

    def resident_layers(self) -> list[tuple[int, LayerExperts]]: ...


@dataclass(frozen=True, slots=True)
class CopyLayout:
    """How an expert's truth and weights lie in a message, and a name for all that both sides must agree on."""

    hidden_size: int
    width: int
    dtype: torch.dtype
    fingerprint: bytes

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: torch.dtype) -> "CopyLayout":
        config = checkpoint.config
        name = hashlib.sha256(f"1 {dtype} {config!r}".encode()).digest()
        return cls(config.hidden_size, config.moe_intermediate_size, dtype, name)

    def room_for_truth(self) -> ExpertTruth:
        """To be filled by `views`."""
        size = self.hidden_size * self.width * self.dtype.itemsize
        sums = [np.empty(num_blocks(n * size), dtype=np.int64) for n in (2, 1)]
        return ExpertTruth(sums[0], sums[1], torch.empty(NUM_GOLDEN_ROWS, self.hidden_size, dtype=self.dtype))


def views(truth: ExpertTruth, w13: torch.Tensor, w2: torch.Tensor) -> list[memoryview]:
    """The bytes of a message, in order; to be sent, or to be filled."""
    tensors = [t.view(-1).view(torch.uint8).numpy() for t in (truth.golden, w13, w2)]
    return [array.data.cast("B") for array in (truth.w13_sums, truth.w2_sums, *tensors)]


class CopyServer:
    """Gives whatever is resident to members of this cluster."""

    def __init__(self, holder: Holder, layout: CopyLayout, *, interface: str, cluster_token: str) -> None:
        self._holder, self._layout, self._token = holder, layout, cluster_token.encode()
        self._takers: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server((interface, 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self.num_given = 0
        threading.Thread(target=self._accept, name="expert-copies", daemon=True).start()

    def close(self) -> None:
        _shut(self._listener)
        with self._lock:
            takers = list(self._takers)
        for taker in takers:
            _shut(taker)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                sock, _ = self._listener.accept()
                with self._lock:
                    full = len(self._takers) >= _MAX_TAKERS
                    if not full:
                        self._takers.add(sock)
                if full:
                    _shut(sock)
                else:
                    threading.Thread(target=self._serve, args=(sock,), name="expert-copies", daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):  # on Linux: of this thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            sock.settimeout(_SILENT_S)
            _send_at_once(sock)
            challenge(sock, self._token, _ROLES)
            sock.sendall(b"\x01")
            held = self._held() if receive_exactly(sock, 32) == self._layout.fingerprint else []
            sock.sendall(_COUNT.pack(len(held)) + b"".join(_CELL.pack(*cell) for cell in held))
            while True:
                sock.settimeout(_IDLE_S)
                cell = _CELL.unpack(receive_exactly(sock, _CELL.size))
                sock.settimeout(_SILENT_S)
                self._give(sock, cell)
        except (OSError, ValueError, struct.error, Unauthenticated):
            pass  # it has what it wanted, or is nobody of ours
        finally:
            with self._lock:
                self._takers.discard(sock)
            _shut(sock)

    def _give(self, sock: socket.socket, cell: Cell) -> None:
        found, truth = self._find(cell), self._holder.truths.known(*cell)
        if found is None or truth is None:
            sock.sendall(b"\x00")
            return
        self.num_given += 1
        sock.sendall(b"\x01")
        for view in views(truth, *found):
            sock.sendall(view)

    def _find(self, cell: Cell) -> tuple[torch.Tensor, torch.Tensor] | None:
        for layer_id, experts in self._holder.resident_layers():
            if layer_id == cell[0] and cell[1] in experts.logical_ids:
                slot = experts.logical_ids.index(cell[1])
                return experts.w13[slot], experts.w2[slot]
        return None

    def _held(self) -> list[Cell]:
        layers = self._holder.resident_layers()
        return list({(layer_id, i): None for layer_id, experts in layers for i in experts.logical_ids if i >= 0})


@dataclass(slots=True, eq=False)
class _Peer:
    """A connection to one giver."""

    member_id: str
    sock: socket.socket
    held: set[Cell] = field(default_factory=set)


class PeerCopies:
    """Asks whoever holds an expert, one after the other. `fetch` from any thread; `release` when done for now."""

    def __init__(
        self,
        own_id: str,
        layout: CopyLayout,
        members: Callable[[], Sequence[Member]],  # who may hold some, as far as is known at a call
        *,
        interface: str,
        cluster_token: str,
    ) -> None:
        self._own_id, self._layout, self._members = own_id, layout, members
        self._interface, self._token = interface, cluster_token.encode()
        self._peers: dict[str, _Peer] = {}
        self._shunned: dict[str, float] = {}  # member -> until when
        self._lock = threading.Lock()
        self.num_fetched = 0

    def fetch(self, layer_id: int, logical: int, w13: torch.Tensor, w2: torch.Tensor) -> ExpertTruth | None:
        """Fill w13 [2 * width, hidden] and w2 [hidden, width]; the giver's truth, or None where nobody has it."""
        cell = (layer_id, logical)
        with self._lock:
            for peer in self._holders(cell):
                try:
                    truth = self._ask(peer, cell, w13, w2)
                except (OSError, ValueError) as error:
                    _log.warning("expert %d of layer %d from %s: %s", logical, layer_id, peer.member_id, error)
                    self._drop(peer)
                    continue
                if truth is not None:
                    self.num_fetched += 1
                    return truth
                peer.held.discard(cell)
        return None

    def release(self) -> None:
        with self._lock:
            for peer in list(self._peers.values()):
                _shut(peer.sock)
            self._peers.clear()

    def _holders(self, cell: Cell) -> Iterator[_Peer]:
        """Takers begin with different givers, so that many that start together do not all ask one."""
        for member in self._members():
            if member.copies_port and member.member_id not in self._peers:
                self._connect(member)
        holders = sorted((p for p in self._peers.values() if cell in p.held), key=lambda p: p.member_id)
        first = hash((self._own_id, cell)) % max(1, len(holders))
        yield from holders[first:] + holders[:first]

    def _connect(self, member: Member) -> None:
        if self._shunned.get(member.member_id, 0.0) > monotonic():
            return
        try:
            sock = socket.create_connection(
                (member.host, member.copies_port), timeout=_CONNECT_S, source_address=(self._interface, 0)
            )
            peer = _Peer(member.member_id, sock)
            self._peers[member.member_id] = peer
            _send_at_once(sock)
            answer(sock, self._token, self._own_id, _ROLES)
            sock.settimeout(_SILENT_S)
            sock.sendall(self._layout.fingerprint)
            (count,) = _COUNT.unpack(receive_exactly(sock, _COUNT.size))
            listed = receive_exactly(sock, count * _CELL.size)
            peer.held = {(layer_id, logical) for layer_id, logical in _CELL.iter_unpack(listed)}
        except (OSError, ValueError, Unauthenticated) as error:
            _log.info("no copies of experts from %s: %s", member.member_id, error)
            self._shunned[member.member_id] = monotonic() + _SHUN_S
            if (failed := self._peers.pop(member.member_id, None)) is not None:
                _shut(failed.sock)

    def _ask(self, peer: _Peer, cell: Cell, w13: torch.Tensor, w2: torch.Tensor) -> ExpertTruth | None:
        peer.sock.sendall(_CELL.pack(*cell))
        if receive_exactly(peer.sock, 1) != b"\x01":
            return None
        truth = self._layout.room_for_truth()
        for view in views(truth, w13, w2):
            _fill(peer.sock, view)
        return truth

    def _drop(self, peer: _Peer) -> None:
        self._shunned[peer.member_id] = monotonic() + _SHUN_S
        self._peers.pop(peer.member_id, None)
        _shut(peer.sock)


def _send_at_once(sock: socket.socket) -> None:
    """A message is several writes; held back until the one before is acknowledged, each expert would take 40 ms."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _fill(sock: socket.socket, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = sock.recv_into(view[done:])
        if not count:
            raise ConnectionError("closed by peer")
        done += count


def _shut(sock: socket.socket) -> None:
    """Close, waking a thread that is blocked in it."""
    with contextlib.suppress(OSError):  # never connected, or gone already
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
