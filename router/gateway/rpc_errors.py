"""Errors of the tree to gRPC statuses and back.

A status carries its facts three ways, so that every client finds one it can read: the message; google.rpc details in
`grpc-status-details-bin` (RetryInfo, BadRequest, ErrorInfo); the plain key `retry-after-s` in the trailing metadata."""

from collections.abc import Iterable

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from ... import errors
from ...errors import ExpertMeshError, InvalidRequest

MAX_MESSAGE_BYTES = 900  # as it travels: gRPC drops a header above 2 KiB without a word, and details hold it encoded
RETRY_KEY = "retry-after-s"
DETAILS_KEY = "grpc-status-details-bin"
DOMAIN = "expertmesh"

_CLASS_OF_CODE: dict[str, type[ExpertMeshError]] = {
    "INVALID_ARGUMENT": errors.InvalidRequest,
    "NOT_FOUND": errors.NotFound,
    "UNAUTHENTICATED": errors.Unauthenticated,
    "ABORTED": errors.SessionConflict,
    "RESOURCE_EXHAUSTED": errors.Overloaded,
    "UNAVAILABLE": errors.Unavailable,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "CANCELLED": errors.RequestCancelled,
}
_CLASS_OF_NAME = {
    c.__name__: c
    for c in vars(errors).values()
    if isinstance(c, type) and issubclass(c, ExpertMeshError) and not issubclass(c, errors.ExchangeError)
}


def status_code(error: ExpertMeshError) -> grpc.StatusCode:
    return grpc.StatusCode[error.code]


def status_message(error: ExpertMeshError) -> str:
    """The message, cut to what surely arrives (percent-encoded on the wire: a byte that is not ASCII takes three)."""
    message, size = error.message, 0
    for i, character in enumerate(message):
        size += 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode("utf-8", "replace"))
        if size > MAX_MESSAGE_BYTES - 3:
            return message[:i] + "..."
    return message


def trailing_metadata(error: ExpertMeshError) -> tuple[tuple[str, str | bytes], ...]:
    """What `context.abort` sends beside code and message."""
    code: int = status_code(error).value[0]
    message = status_message(error)
    status = status_pb2.Status(code=code, message=message)
    info = error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=DOMAIN)
    for name in ("field", "kind", "name", "session_id", "expected_version", "current_version"):
        if (value := getattr(error, name, None)) is not None:
            info.metadata[name] = str(value)[:200]
    _add(status, info)
    if isinstance(error, InvalidRequest):
        bad = error_details_pb2.BadRequest()
        field, expected = getattr(error, "field", ""), getattr(error, "expected", "")  # not of one that a replica sent
        bad.field_violations.add(field=field[:100], description=f"expected {expected}"[:200] if expected else "")
        _add(status, bad)
    metadata: list[tuple[str, str | bytes]] = []
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        _add(status, error_details_pb2.RetryInfo(retry_delay=delay))
        metadata.append((RETRY_KEY, f"{error.retry_after_s:.3f}"))
    return (*metadata, (DETAILS_KEY, status.SerializeToString()))


def make_error(code: str, message: str, *, retry_after_s: float | None = None, name: str = "") -> ExpertMeshError:
    """An error of the tree from what travelled: the status name, the message, and the class name where it is known.

    Its message is the sender's, so it is set as it is instead of being put together again by the constructor."""
    cls = _CLASS_OF_NAME.get(name) or _CLASS_OF_CODE.get(code)
    if cls is None or cls.code != code:
        cls = type(
            "RemoteError", (ExpertMeshError,), {"code": code if code in grpc.StatusCode.__members__ else "INTERNAL"}
        )
    error = cls.__new__(cls)
    ExpertMeshError.__init__(error, message, retry_after_s=retry_after_s)
    return error


def from_rpc(code: grpc.StatusCode, message: str, metadata: Iterable[tuple[str, str | bytes]]) -> ExpertMeshError:
    """A received status as an error of the tree, with the facts of its details as fields."""
    found = dict(metadata)
    info = _error_info(found.get(DETAILS_KEY, b""))
    error = make_error(
        code.name, message, retry_after_s=_seconds(found.get(RETRY_KEY)), name=info.reason if info else ""
    )
    for name, value in info.metadata.items() if info else ():
        setattr(error, name, int(value) if name.endswith("_version") else value)
    return error


def _seconds(text: str | bytes | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _add(status: status_pb2.Status, detail: object) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def _error_info(data: str | bytes) -> error_details_pb2.ErrorInfo | None:
    if not isinstance(data, bytes) or not data:
        return None
    try:
        details = status_pb2.Status.FromString(data).details
    except DecodeError:  # somebody else's
        return None
    for detail in details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            return info
    return None
