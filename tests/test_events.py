"""Promise: the bytes written by hand are the bytes that protobuf writes."""

from hypothesis import given
from hypothesis import strategies as st

from expertmesh.proto import expertmesh_pb2 as pb
from expertmesh.request import TokenLogprob
from expertmesh.router.gateway.conversation import Delta, Section
from expertmesh.router.gateway.events import EventWriter, encode_arguments, encode_text


@given(
    offset=st.integers(0, 2**40),
    section=st.sampled_from([Section.REASONING, Section.ANSWER]),
    text=st.one_of(st.text(max_size=10), st.text(min_size=40, max_size=20_000)),
)
def test_a_text_delta_is_encoded_as_protobuf_does(offset, section, text):
    message = pb.GenerateEvent(offset=offset, **{section.name.lower(): pb.Delta(text=text)})
    assert encode_text(offset, section, text) == message.SerializeToString(deterministic=True)


@given(offset=st.integers(0, 2**40), index=st.integers(0, 300), text=st.text(max_size=300))
def test_a_piece_of_arguments_is_encoded_as_protobuf_does(offset, index, text):
    message = pb.GenerateEvent(offset=offset, tool_call=pb.ToolCallDelta(index=index, arguments_text=text))
    assert encode_arguments(offset, index, text) == message.SerializeToString(deterministic=True)


async def test_ids_and_logprobs_are_written_when_there():
    written: list[bytes] = []

    async def write(data: bytes) -> None:
        written.append(data)

    delta = Delta(Section.REASONING, "a", [1, 2], [TokenLogprob(1, -0.5, ((1, -0.5),))])
    await EventWriter(write).delta(3, delta, with_ids=True)
    event = pb.GenerateEvent.FromString(written[0])
    assert (event.offset, event.reasoning.text, list(event.reasoning.token_ids)) == (3, "a", [1, 2])
    assert event.reasoning.logprobs[0].top[0].token_id == 1
