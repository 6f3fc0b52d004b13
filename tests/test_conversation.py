"""Promise: however a stream is cut, the joined deltas equal what the whole text gives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.bench import fuzz_chunks
from expertmesh.request import TokenLogprob
from expertmesh.router.gateway.conversation import Conversation, Delta, Section, State, StopFinder, prompt_state
from expertmesh.router.gateway.tokenizer import QWEN3_FOLDER, Tokenizer

TOKENIZER = Tokenizer(QWEN3_FOLDER)
THINK, END_THINK, IM_END = 151667, 151668, 151645


def whole(ids: list[int], state: State, stop: tuple[str, ...], strip: bool) -> tuple[str, str, int]:
    """Reasoning, answer and number of counted tokens by slicing the whole list: the definition, not the machine."""
    thought, answer, at = "", "", 0
    lead = strip or state is not State.OPEN
    while True:
        if state is not State.REASONING:
            end = ids.index(THINK, at) if state is State.OPEN and THINK in ids[at:] else len(ids)
            text, stopped, taken = _answer(ids[at:end], stop, lead=lead, trail=strip)
            answer += text
            if stopped or end == len(ids):
                return thought, answer, at + taken
            at = end + 1
        end = ids.index(END_THINK, at) if END_THINK in ids[at:] else len(ids)
        thought += TOKENIZER.decode(ids[at:end]).strip("\n")
        if end == len(ids):
            return thought, answer, end
        at, state, lead = end + 1, State.OPEN, True


def _answer(ids: list[int], stop: tuple[str, ...], *, lead: bool, trail: bool) -> tuple[str, bool, int]:
    """Text of a run of answer ids, whether a stop string ended it and how many ids that took."""
    shaped = TOKENIZER.decode(ids)
    shaped = shaped.lstrip("\n") if lead else shaped
    ends = [(shaped.find(s) + len(s), -len(s)) for s in stop if s in shaped]
    if not ends:
        return (shaped.rstrip("\n") if trail else shaped), False, len(ids)
    end, negative = min(ends)
    text = shaped[: end + negative]
    for n in range(1, len(ids) + 1):
        prefix = TOKENIZER.decode(ids[:n])
        while prefix.endswith("\ufffd") and not shaped.startswith(prefix.lstrip("\n") if lead else prefix):
            prefix = prefix[:-1]
        prefix = prefix.lstrip("\n") if lead else prefix
        if any(s in prefix for s in stop):
            return (text.rstrip("\n") if trail else text), True, n
    return (text.rstrip("\n") if trail else text), True, len(ids)


def run(ids: list[int], cuts: list[int], state: State, stop: tuple[str, ...] = (), strip: bool = True):
    machine = Conversation(TOKENIZER, state=state, stop=stop, strip_answer=strip, stop_ids=frozenset({IM_END}))
    deltas, at = [], 0
    for cut in [*sorted(c % (len(ids) + 1) for c in cuts), len(ids)]:
        deltas += machine.push(ids[at:cut])
        at = cut
    deltas += machine.finish()
    return machine, deltas


def joined(deltas, section: Section) -> str:
    return "".join(d.text for d in deltas if d.section is section)


EMOJI = TOKENIZER.encode("👩‍👩‍👧 你好 é 🤦🏽‍♂️ naïve\n\n")
TOKENS = st.one_of(
    st.sampled_from([THINK, END_THINK, IM_END, 198, 271, 151644, 151657]),
    st.sampled_from(EMOJI),
    st.sampled_from(TOKENIZER.encode("stop sto STOP end ab aab abab \n")),
    st.integers(0, 255),  # single bytes: broken UTF-8 too
)


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(TOKENS, max_size=24),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    state=st.sampled_from(list(State)),
    stop=st.lists(st.sampled_from(["stop", "STOP", "ab", "aab", "abab", "\n\n", "好", "é", "end\n"]), max_size=3),
    strip=st.booleans(),
)
def test_any_chunking_gives_what_the_whole_text_gives(ids, cuts, state, stop, strip):
    machine, deltas = run(ids, cuts, state, tuple(stop), strip)
    one_by_one, single = run(ids, list(range(len(ids))), state, tuple(stop), strip)
    for section in Section:
        assert joined(deltas, section) == joined(single, section)
    assert (machine.completion_tokens, machine.reasoning_tokens, machine.stop_matched) == (
        one_by_one.completion_tokens,
        one_by_one.reasoning_tokens,
        one_by_one.stop_matched,
    )
    assert [i for d in deltas for i in d.token_ids] == ids[: machine.completion_tokens]
    thought, answer, counted = whole(ids, state, tuple(stop), strip)
    assert joined(deltas, Section.REASONING) == thought
    assert joined(deltas, Section.ANSWER) == answer
    assert machine.completion_tokens == counted


@pytest.mark.parametrize("seed", range(2))
def test_random_cuts_say_what_the_whole_text_says(seed):
    """A part of what `make fuzz` does with another seed each time."""
    figures = fuzz_chunks.run(10_000 * seed, 5_000)
    assert min(figures["stopped"], figures["calls"], figures["malformed"], figures["blocks"]) > 20


def test_a_machine_that_loses_something_is_found(monkeypatch):
    monkeypatch.setattr(Conversation, "_push_plain", lambda self, token_id: Delta(Section.ANSWER, "", [token_id]))
    with pytest.raises(AssertionError, match="stream"):
        fuzz_chunks.run(0, 1_000)


def test_thinking_and_answer_are_split_and_stripped():
    ids = [THINK, 198, *TOKENIZER.encode("a thought\n"), END_THINK, 271, *TOKENIZER.encode("the answer"), IM_END]
    machine, deltas = run(ids, list(range(len(ids))), State.OPEN)
    assert joined(deltas, Section.REASONING) == "a thought"
    assert joined(deltas, Section.ANSWER) == "the answer"
    assert machine.reasoning_tokens == ids.index(END_THINK) + 1
    assert machine.completion_tokens == len(ids)


def test_empty_block_leaves_no_reasoning_text():
    machine, deltas = run([THINK, 271, END_THINK, 271, *TOKENIZER.encode("yes")], [], State.OPEN)
    assert joined(deltas, Section.REASONING) == ""
    assert joined(deltas, Section.ANSWER) == "yes"
    assert machine.reasoning_tokens == 3


def test_output_cut_inside_the_block_is_reasoning():
    machine, deltas = run(TOKENIZER.encode("still going"), [], State.REASONING)
    assert joined(deltas, Section.REASONING) == "still going"
    assert machine.state is State.REASONING


def test_after_the_hard_switch_everything_is_answer():
    _, deltas = run([*TOKENIZER.encode("no block "), THINK], [], State.CLOSED)
    assert joined(deltas, Section.ANSWER) == "no block <think>"


def test_stop_string_across_tokens_drops_what_follows_uncounted():
    ids = TOKENIZER.encode("one two three four five")
    machine, deltas = run(ids, list(range(len(ids))), State.CLOSED, stop=("o three",))
    assert joined(deltas, Section.ANSWER) == "one tw"
    assert machine.stop_matched == "o three"
    assert machine.completion_tokens == 3
    assert machine.push([1, 2, 3]) == []


def test_stop_string_in_thinking_ends_nothing():
    ids = [*TOKENIZER.encode("x STOP y"), END_THINK, *TOKENIZER.encode("a STOP b")]
    machine, deltas = run(ids, [], State.REASONING, stop=("STOP",))
    assert joined(deltas, Section.REASONING) == "x STOP y"
    assert joined(deltas, Section.ANSWER) == "a "
    assert machine.stop_matched == "STOP"


def test_a_character_is_held_until_it_is_whole():
    ids = TOKENIZER.encode("👩‍👧")
    machine = Conversation(TOKENIZER, state=State.CLOSED)
    assert all("\ufffd" not in d.text for i in ids for d in machine.push([i]))


def test_logprobs_travel_with_their_tokens():
    ids = TOKENIZER.encode("a b c")
    machine = Conversation(TOKENIZER, state=State.CLOSED)
    deltas = machine.push(ids, [TokenLogprob(i, -0.5) for i in ids])
    assert [x.token_id for x in deltas[0].logprobs] == ids


def test_plain_completion_keeps_its_newlines():
    _, deltas = run(TOKENIZER.encode("\n    return 1\n\n"), [], State.OPEN, strip=False)
    assert joined(deltas, Section.ANSWER) == "\n    return 1\n\n"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", State.OPEN),
        ("<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n", State.OPEN),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", State.CLOSED),
        ("<|im_start|>assistant\n<think>\n", State.REASONING),
        ("", State.OPEN),
    ],
)
def test_the_prompt_decides_the_starting_state(prompt, expected):
    assert prompt_state(TOKENIZER.encode(prompt), TOKENIZER.special_ids) is expected


@settings(max_examples=500, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4))
def test_stop_finder_agrees_with_a_search_of_the_whole_text(text, stops):
    finder = StopFinder(stops)
    got = ""
    for char in text:
        got += finder.push(char)
        if finder.matched:
            break
    ends = [(text.find(s) + len(s), -len(s)) for s in stops if s in text]
    expected = text[: sum(min(ends))] if ends else text
    assert got + ("" if finder.matched else finder.flush()) == expected
