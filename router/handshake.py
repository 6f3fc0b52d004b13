"""Two processes of one cluster prove to each other that they know its token, before a byte of anything else.

HMAC-SHA256 over both sides' nonces and the caller's name; the caller proves itself first. Used by every TCP listener of
the cluster's own (`control.py`, `experts/copies.py`). Idea: the challenge-response of multiprocessing.connection,
without its pickles."""

import hmac
import secrets
import socket
import struct

from ..errors import Unauthenticated

_MAGIC = b"EMC1"
_NONCE_BYTES = _MAC_BYTES = 32
_MAX_ID_BYTES = 512
Roles = tuple[bytes, bytes]  # what the caller and the listener sign as: a proof for one protocol is none for another
MEMBER_AND_LEADER: Roles = (b"member", b"leader")


def challenge(sock: socket.socket, token: bytes, roles: Roles = MEMBER_AND_LEADER) -> str:
    """The listener's half: returns the proven member id."""
    own_nonce = secrets.token_bytes(_NONCE_BYTES)
    sock.sendall(_MAGIC + own_nonce)
    peer_nonce = receive_exactly(sock, _NONCE_BYTES)
    (id_bytes,) = struct.unpack("!H", receive_exactly(sock, 2))
    if id_bytes > _MAX_ID_BYTES:
        raise Unauthenticated("member id too long")
    member_id = receive_exactly(sock, id_bytes)
    proof = receive_exactly(sock, _MAC_BYTES)
    if not hmac.compare_digest(proof, _mac(token, roles[0], own_nonce, peer_nonce, member_id)):
        raise Unauthenticated("wrong cluster token")
    sock.sendall(_mac(token, roles[1], own_nonce, peer_nonce, member_id))
    return member_id.decode()


def answer(sock: socket.socket, token: bytes, own_id: str, roles: Roles = MEMBER_AND_LEADER) -> None:
    """The caller's half: proves itself first, then checks the listener."""
    if receive_exactly(sock, len(_MAGIC)) != _MAGIC:
        raise Unauthenticated("peer speaks another protocol")
    peer_nonce = receive_exactly(sock, _NONCE_BYTES)
    own_nonce, member_id = secrets.token_bytes(_NONCE_BYTES), own_id.encode()
    proof = _mac(token, roles[0], peer_nonce, own_nonce, member_id)
    sock.sendall(own_nonce + struct.pack("!H", len(member_id)) + member_id + proof)
    if not hmac.compare_digest(
        receive_exactly(sock, _MAC_BYTES), _mac(token, roles[1], peer_nonce, own_nonce, member_id)
    ):
        raise Unauthenticated("the listener does not know the cluster token")
    receive_exactly(sock, 1)  # the listener is ready for us


def _mac(token: bytes, role: bytes, listener_nonce: bytes, caller_nonce: bytes, member_id: bytes) -> bytes:
    return hmac.digest(token, role + listener_nonce + caller_nonce + member_id, "sha256")


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    chunks = bytearray()
    while len(chunks) < size:
        chunk = sock.recv(size - len(chunks))
        if not chunk:
            raise ConnectionError("closed by peer")
        chunks += chunk
    return bytes(chunks)
