"""The events of a generation on the wire: `expertmesh.v1.GenerateEvent` as bytes.

Why by hand for deltas of text and of a call's arguments: they are nearly all of a stream, and building a message tree
to serialise two fields costs eight times as much. The bytes are what protobuf itself would write (a property test
compares)."""

from collections.abc import Awaitable, Callable

from ...proto import expertmesh_pb2 as pb
from .conversation import Delta, Section
from .link_messages import encode_logprob

_EVENT, _DELTA = pb.GenerateEvent.DESCRIPTOR.fields_by_name, pb.Delta.DESCRIPTOR.fields_by_name
_LENGTH_DELIMITED = 2  # wire type
_OFFSET_TAG = bytes([_EVENT["offset"].number << 3])
_TEXT_TAG = bytes([_DELTA["text"].number << 3 | _LENGTH_DELIMITED])
_KIND_TAGS = {
    Section.REASONING: bytes([_EVENT["reasoning"].number << 3 | _LENGTH_DELIMITED]),
    Section.ANSWER: bytes([_EVENT["answer"].number << 3 | _LENGTH_DELIMITED]),
}
_CALL = pb.ToolCallDelta.DESCRIPTOR.fields_by_name
_CALL_TAG = bytes([_EVENT["tool_call"].number << 3 | _LENGTH_DELIMITED])
_INDEX_TAG = bytes([_CALL["index"].number << 3])
_ARGUMENTS_TAG = bytes([_CALL["arguments_text"].number << 3 | _LENGTH_DELIMITED])
_VARINTS = tuple(bytes([i]) for i in range(128))


class EventWriter:
    """Gives each event of one stream its bytes and writes them. Another front door writes another form."""

    __slots__ = ("_write",)

    def __init__(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        self._write = write

    def started(self, offset: int, started: pb.Started) -> Awaitable[None]:
        return self._write(pb.GenerateEvent(offset=offset, started=started).SerializeToString())

    def delta(self, offset: int, delta: Delta, *, with_ids: bool) -> Awaitable[None]:
        if with_ids or delta.logprobs or delta.name or delta.malformed:
            return self._write(_encode_full(offset, delta, with_ids=with_ids))
        if delta.section is Section.TOOL_CALL:
            return self._write(encode_arguments(offset, delta.index, delta.text))
        return self._write(encode_text(offset, delta.section, delta.text))

    def finished(self, offset: int, finished: pb.Finished) -> Awaitable[None]:
        return self._write(pb.GenerateEvent(offset=offset, finished=finished).SerializeToString())


def encode_text(offset: int, section: Section, text: str) -> bytes:
    """A delta of text alone."""
    data = text.encode()
    if data:
        data = _TEXT_TAG + _varint(len(data)) + data
    head = _OFFSET_TAG + _varint(offset) if offset else b""
    return head + _KIND_TAGS[section] + _varint(len(data)) + data


def encode_arguments(offset: int, index: int, text: str) -> bytes:
    """A piece of a call's arguments alone."""
    data = text.encode()
    if data:
        data = _ARGUMENTS_TAG + _varint(len(data)) + data
    if index:
        data = _INDEX_TAG + _varint(index) + data
    head = _OFFSET_TAG + _varint(offset) if offset else b""
    return head + _CALL_TAG + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    if value < 128:
        return _VARINTS[value]
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    data.append(value)
    return bytes(data)


def _encode_full(offset: int, delta: Delta, *, with_ids: bool) -> bytes:
    data: bytes
    if delta.section is Section.TOOL_CALL:
        call = pb.ToolCallDelta(
            index=delta.index,
            name=delta.name,
            arguments_text=delta.text,
            malformed=delta.malformed,
            token_ids=delta.token_ids if with_ids else (),
            logprobs=[encode_logprob(x) for x in delta.logprobs],
        )
        data = pb.GenerateEvent(offset=offset, tool_call=call).SerializeToString()
        return data
    message = pb.Delta(
        text=delta.text,
        token_ids=delta.token_ids if with_ids else (),
        logprobs=[encode_logprob(x) for x in delta.logprobs],
    )
    event = pb.GenerateEvent(offset=offset)
    (event.answer if delta.section is Section.ANSWER else event.reasoning).CopyFrom(message)
    data = event.SerializeToString()
    return data
