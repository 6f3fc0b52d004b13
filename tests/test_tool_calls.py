"""Promise: tool calls come out of a stream as they are written, however it is cut, and nothing written is lost."""

import json
import re

import pytest
from gateway_world import chat, gateway, say, text_of, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.proto import expertmesh_pb2 as pb
from expertmesh.redis_server import EmbeddedRedis
from expertmesh.router.gateway.conversation import Conversation, Section, State
from expertmesh.router.gateway.forced_call import call_beginning
from expertmesh.router.gateway.session import SessionStore

TOKENIZER = tokenizer()
IM_END, CALL, END_CALL = 151645, 151657, 151658
TOOL = pb.Tool(name="weather", parameters_json='{"type": "object"}')
ONE = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln 👋", "days": [1, 2]}}\n</tool_call>'
TWO = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


def parse(ids: list[int], cuts: list[int], state: State = State.OPEN):
    machine = Conversation(TOKENIZER, state=state, stop_ids=frozenset({IM_END}), tools=True)
    deltas, at = [], 0
    for cut in [*sorted(c % (len(ids) + 1) for c in cuts), len(ids)]:
        deltas += machine.push(ids[at:cut])
        at = cut
    return machine, deltas + machine.finish()


def joined(deltas) -> list[tuple[str, str, bool]]:
    """(name, arguments, malformed) of every call."""
    calls: dict[int, list] = {}
    for delta in deltas:
        if delta.section is Section.TOOL_CALL:
            call = calls.setdefault(delta.index, ["", "", False])
            assert not (call[0] and delta.name), "a name comes once"
            call[0] += delta.name
            call[1] += delta.text
            call[2] |= delta.malformed
    assert list(calls) == list(range(len(calls)))
    return [tuple(c) for c in calls.values()]


def every_token(text: str, state: State = State.OPEN):
    ids = TOKENIZER.encode(text)
    return parse(ids, list(range(len(ids))), state)


def test_text_then_two_calls():
    machine, deltas = every_token(f"<think>\nhm\n</think>\n\nLet me look.\n{ONE}\n{TWO}<|im_end|>")
    assert "".join(d.text for d in deltas if d.section is Section.ANSWER) == "Let me look."
    assert joined(deltas) == [("weather", '{"city": "Köln 👋", "days": [1, 2]}', False), ("clock", "{}", False)]
    assert [c.name for c in machine.tool_calls] == ["weather", "clock"]


def test_arguments_come_as_they_are_written():
    _, deltas = every_token(ONE)
    pieces = [d.text for d in deltas if d.section is Section.TOOL_CALL and d.text]
    assert len(pieces) > 5


def test_a_call_inside_thinking_is_thinking():
    machine, deltas = every_token(f"<think>\nmaybe {ONE} or not\n</think>\n\nno")
    assert joined(deltas) == []
    assert "weather" in "".join(d.text for d in deltas if d.section is Section.REASONING)
    assert machine.tool_calls == []


@pytest.mark.parametrize(
    ("body", "name", "text"),
    [
        ('{"name": "weather", "arguments": {"city": 1 + 1}}', "weather", '{"city": 1 + 1}}'),
        ('{"name": "weather", "arguments": {"a": 1}} trailing', "weather", '{"a": 1}} trailing'),
        ('{"name": "weather", "arguments": {"a": 1', "weather", '{"a": 1'),
        ("not json at all", "", "not json at all"),
        ('{"name": 5, "arguments": {}}', "", '{"name": 5, "arguments": {}}'),
        ('{"name": "weather", "arguments": [1]}', "", '{"name": "weather", "arguments": [1]}'),
        ("", "", ""),
    ],
)
def test_what_is_not_a_call_is_given_as_text_with_the_flag(body, name, text):
    _, deltas = every_token(f"<tool_call>\n{body}\n</tool_call>")
    ((got_name, got_text, malformed),) = joined(deltas)
    assert (got_name, got_text.rstrip("\n"), malformed) == (name, text, True)


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"arguments": {"a": 1}, "name": "weather"}', {"a": 1}),
        ('{"name": "weather"}', {}),
        ('{"name": "weather", "arguments": "{\\"a\\": 2}"}', {"a": 2}),
        ('{ "name" : "weather" ,\n"arguments" : {"a": "}{"} }', {"a": "}{"}),
        ('{"id": "' + "x" * 600 + '", "name": "weather", "arguments": {"a": 3}}', {"a": 3}),
    ],
)
def test_other_forms_of_a_call_are_calls(body, arguments):
    _, deltas = every_token(f"<tool_call>\n{body}\n</tool_call>")
    ((name, text, malformed),) = joined(deltas)
    assert (name, json.loads(text), malformed) == ("weather", arguments, False)


def test_a_call_cut_by_a_limit_is_malformed_and_a_whole_one_without_its_tag_is_not():
    assert joined(every_token(ONE[: ONE.index("days")])[1]) == [("weather", '{"city": "Köln 👋", "', True)]
    assert joined(every_token(ONE.removesuffix("</tool_call>"))[1])[0][2] is False
    assert joined(every_token("<tool_call>\n{")[1]) == [("", "{", True)]


TOKENS = st.one_of(
    st.sampled_from([CALL, END_CALL, 151667, 151668, IM_END, 198]),
    st.sampled_from(TOKENIZER.encode(ONE)),
    st.sampled_from(TOKENIZER.encode('{"name": "a", "arguments": {"b": "\\" } 👩‍👧"}} {} [] ,')),
    st.integers(0, 255),
)
CALLS = st.sampled_from([TOKENIZER.encode(x) for x in (ONE, TWO, ONE[:-30], "text 👋\n", "<think>\nx</think>")])
STREAMS = st.one_of(
    st.lists(TOKENS, max_size=30), st.lists(CALLS, max_size=4).map(lambda parts: [i for p in parts for i in p])
)


@settings(max_examples=1500, deadline=None)
@given(ids=STREAMS, cuts=st.lists(st.integers(0, 90), max_size=8), state=st.sampled_from(list(State)))
def test_any_chunking_gives_what_one_token_at_a_time_gives(ids, cuts, state):
    machine, deltas = parse(ids, cuts, state)
    single_machine, single = parse(ids, list(range(len(ids))), state)
    assert joined(deltas) == joined(single)
    for section in (Section.REASONING, Section.ANSWER):
        assert "".join(d.text for d in deltas if d.section is section) == "".join(
            d.text for d in single if d.section is section
        )
    assert machine.tool_calls == single_machine.tool_calls
    assert [i for d in deltas for i in d.token_ids] == ids
    if state is State.CLOSED:  # no thinking: the calls are what a search of the whole text finds
        text = TOKENIZER.decode(ids)
        bodies = [re.split("</tool_call>", part)[0] for part in text.split("<tool_call>")[1:]]
        assert len(machine.tool_calls) == len(bodies)


# ---------------------------------------------------------------- through a gateway


async def test_calls_are_streamed_and_the_turn_ends_with_tool_calls():
    async with gateway(say(f"<think>\nhm\n</think>\n\nok\n{ONE}<|im_end|>")) as world:
        events = await world.generate(chat=chat("hi"), tools=[TOOL])
        calls = [e.tool_call for e in events if e.WhichOneof("event") == "tool_call"]
        assert "".join(c.name for c in calls) == "weather"
        assert json.loads("".join(c.arguments_text for c in calls)) == {"city": "Köln 👋", "days": [1, 2]}
        assert text_of(events) == "ok"
        assert events[-1].finished.reason == pb.FINISH_REASON_TOOL_CALLS
        assert [e.offset for e in events] == list(range(len(events)))


async def test_without_tools_and_with_choice_none_tags_are_text():
    async with gateway(say(f"{TWO}<|im_end|>")) as world:
        assert text_of(await world.generate(chat=chat("hi"))) == TWO
        none = pb.ToolChoice(mode=pb.ToolChoice.NONE)
        events = await world.generate(chat=chat("hi"), tools=[TOOL], tool_choice=none)
        assert text_of(events) == TWO
        assert events[-1].finished.reason == pb.FINISH_REASON_STOP
        assert "# Tools" not in TOKENIZER.decode(world.engine.submitted[1].prompt_ids)


async def test_a_call_cut_by_max_tokens_finishes_with_length():
    async with gateway(say(ONE)) as world:
        sampling = pb.SamplingOptions(max_tokens=20)
        events = await world.generate(chat=chat("hi"), tools=[TOOL], sampling=sampling)
        assert events[-1].finished.reason == pb.FINISH_REASON_LENGTH
        assert events[-2].tool_call.malformed


@pytest.mark.parametrize("name", ["", "weather"])
@pytest.mark.parametrize("thinks", [True, False])
async def test_a_required_call_comes_behind_the_thinking(name, thinks):
    beginning = list(call_beginning(TOKENIZER, name))
    thought = TOKENIZER.encode("<think>\nno tools\n</think>\n\n") if thinks else []

    def reply(request):
        rest = TOKENIZER.encode(' {"city": "Rom"}}\n</tool_call><|im_end|>' if name else 'weather", "arguments": {}}')
        return [*thought, *beginning, *rest] if request.output_ids else [*thought, *TOKENIZER.encode("I will not.")]

    async with gateway(reply) as world:
        mode = pb.ToolChoice.NAMED if name else pb.ToolChoice.REQUIRED
        choice = pb.ToolChoice(mode=mode, name=name)
        events = await world.generate(chat=chat("hi"), tools=[TOOL], tool_choice=choice, include_token_ids=True)
        calls = [e.tool_call for e in events if e.WhichOneof("event") == "tool_call"]
        assert "".join(c.name for c in calls) == "weather"
        assert json.loads("".join(c.arguments_text for c in calls)) == ({"city": "Rom"} if name else {})
        assert text_of(events) == ""
        ids = [i for e in events[1:-1] for i in getattr(e, e.WhichOneof("event")).token_ids]
        assert ids[: len(thought) + len(beginning)] == [*thought, *beginning]
        assert events[-1].finished.usage.completion_tokens == len(ids)


async def test_a_turn_that_would_end_inside_its_thinking_makes_the_required_call():
    beginning = list(call_beginning(TOKENIZER, "weather"))
    thought = TOKENIZER.encode("<think>\nenough")
    closed = [*thought, *TOKENIZER.encode("</think>\n\n")]

    def reply(request):
        if not request.output_ids:
            return [*thought, IM_END]
        return [*closed, *beginning, *TOKENIZER.encode(" {}}\n</tool_call><|im_end|>")]

    async with gateway(reply) as world:
        choice = pb.ToolChoice(mode=pb.ToolChoice.NAMED, name="weather")
        events = await world.generate(chat=chat("hi"), tools=[TOOL], tool_choice=choice, include_token_ids=True)
        assert events[-1].finished.reason == pb.FINISH_REASON_TOOL_CALLS
        assert text_of(events, "reasoning") == "enough"
        ids = [i for e in events[1:-1] for i in getattr(e, e.WhichOneof("event")).token_ids]
        assert ids[: len(closed) + len(beginning)] == [*closed, *beginning]


async def test_wrong_choices_are_refused():
    async with gateway(say("x")) as world:
        for fields, field in (
            ({"tool_choice": pb.ToolChoice()}, "tool_choice:"),
            ({"tools": [TOOL], "tool_choice": pb.ToolChoice(mode=9)}, "tool_choice.mode:"),
            ({"tools": [TOOL], "tool_choice": pb.ToolChoice(mode=3, name="other")}, "tool_choice.name:"),
            ({"tools": [TOOL], "tool_choice": pb.ToolChoice(mode=0, name="weather")}, "tool_choice.name:"),
        ):
            call = world.generation.Generate(pb.GenerateRequest(chat=chat("hi"), **fields))
            assert (await world.refused(call)).details().startswith(field)


async def test_a_session_keeps_calls_and_takes_results_in_order():
    redis = EmbeddedRedis()
    store = SessionStore(redis.url)
    try:
        async with gateway(say(f"{ONE}\n{TWO}<|im_end|>"), sessions=store) as world:
            await world.generate(chat=chat("hi"), tools=[TOOL], session_id="s")
            results = [pb.Message(role="tool", content=text) for text in ("rain", "noon")]
            await world.generate(chat=pb.Chat(messages=results), tools=[TOOL], session_id="s")
            prompt = TOKENIZER.decode(world.engine.submitted[1].prompt_ids, skip_special=False)
            assert f"{ONE}\n{TWO}<|im_end|>" in prompt
            assert "<tool_response>\nrain\n</tool_response>\n<tool_response>\nnoon\n</tool_response>" in prompt
            session = await world.sessions.Get(pb.GetSessionRequest(session_id="s"))
            assert [c.name for c in session.turns[0].messages[1].tool_calls] == ["weather", "clock"]
    finally:
        await store.close()
        redis.stop()
