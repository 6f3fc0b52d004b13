"""The conversation's promise under random cuts: however a stream comes in pieces, it says what the whole text says.

Streams are drawn from text in many scripts, emoji, single bytes, tags anywhere, tool calls whole and damaged, and any
id of the vocabulary; each is cut in several ways (one id at a time, all at once, random pieces). What it must say is
worked out from the whole list of ids by slicing, not by the machine. The last line is JSON.

    python -P -m expertmesh.bench.fuzz_chunks [--seed N] [--cuts 100000]"""

import argparse
import codecs
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random, SystemRandom
from typing import Any

from ..router.gateway.conversation import Conversation, Delta, Section, State
from ..router.gateway.tokenizer import QWEN3_FOLDER, Tokenizer
from ..router.gateway.tool_calls import ToolCallParser

WAYS = 10  # cuts of each stream
STOPS = ("stop", "STOP", "ab", "aab", "abab", "\n\n", "好", "é", "end\n", "👧")
TEXTS = (
    "👩‍👩‍👧 你好 é 🤦🏽‍♂️ naïve\n\n", "stop sto STOP end ab aab abab \n", " Привет мир, مرحبا 日本語 한국어 ไทย\n",
    '\n{"name": "weather", "arguments": {"city": "Köln 👋", "days": [1, 2]}}\n', '{"name": "x", "arguments": "{}"}',
    '{"arguments": {"a": "}"}, "name": "late"}', '{"name": "cut", "arguments": {"a": [1, ', "<think>", "</tool_call>",
    "e\u0301\u200d\ufe0f",
)  # fmt: skip


@dataclass(slots=True)
class Said:
    """What a stream says in all."""

    reasoning: str = ""
    answer: str = ""
    calls: list[tuple[str, str, bool]] = field(default_factory=list)  # name, arguments, malformed
    num_counted: int = 0


@dataclass(frozen=True, slots=True)
class Stream:
    ids: list[int]
    state: State
    stop: tuple[str, ...]
    strip: bool
    tools: bool


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(QWEN3_FOLDER)


def run(seed: int, cuts: int) -> dict[str, Any]:
    """Cut streams `cuts` times in all. AssertionError names the seed of the stream that broke the promise."""
    num_cuts = num_streams = num_ids = 0
    kinds = {"stopped": 0, "calls": 0, "malformed": 0, "blocks": 0}
    while num_cuts < cuts:
        stream_seed = seed + num_streams
        stream = draw(Random(stream_seed))
        expected = whole(stream)
        numbers = Random(~stream_seed)
        for way in range(min(WAYS, cuts - num_cuts)):
            check(stream, _pieces(numbers, len(stream.ids), way), expected, f"stream {stream_seed}, way {way}")
            num_cuts += 1
        num_streams, num_ids = num_streams + 1, num_ids + len(stream.ids)
        kinds["stopped"] += expected.num_counted < len(stream.ids)
        kinds["calls"] += any(not malformed for *_, malformed in expected.calls)
        kinds["malformed"] += any(malformed for *_, malformed in expected.calls)
        kinds["blocks"] += bool(expected.reasoning)
    return {"seed": seed, "cuts": num_cuts, "streams": num_streams, "ids": num_ids, **kinds}


def draw(numbers: Random) -> Stream:
    special = tokenizer().special_ids
    tags = [special.think, special.end_think, special.tool_call, special.end_tool_call, *special.eos, 198, 271]
    ids: list[int] = []
    for _ in range(numbers.randint(0, 12)):
        match numbers.randrange(5):
            case 0:
                ids += [i for i in numbers.choices(tags, k=numbers.randint(1, 3)) if i is not None]
            case 1:
                ids += [numbers.randrange(256) for _ in range(numbers.randint(1, 4))]  # single bytes
            case 2:
                ids.append(numbers.randrange(tokenizer().vocab_size))
            case 3 if special.tool_call is not None and special.end_tool_call is not None:
                ids += [special.tool_call, *_encoded(numbers.choice(TEXTS)), special.end_tool_call]
            case _:
                text = _encoded(numbers.choice(TEXTS))
                begin = numbers.randrange(len(text))
                ids += text[begin : begin + numbers.randint(1, 12)]
    return Stream(
        ids=ids,
        state=numbers.choice(list(State)),
        stop=tuple(numbers.sample(STOPS, numbers.choice((0, 1, 2, 4)))),
        strip=numbers.random() < 0.7,
        tools=numbers.random() < 0.5,
    )


def check(stream: Stream, ends: Sequence[int], expected: Said, name: str) -> None:
    """One way of cutting: pieces end at `ends`, ascending, the last at the end of the stream."""
    machine = Conversation(
        tokenizer(),
        state=stream.state,
        stop=stream.stop,
        stop_ids=tokenizer().special_ids.eos,
        strip_answer=stream.strip,
        tools=stream.tools,
    )
    deltas: list[Delta] = []
    begin = 0
    for end in ends:
        deltas += machine.push(stream.ids[begin:end])
        begin = end
    deltas += machine.finish()
    said = Said(num_counted=machine.completion_tokens)
    for delta in deltas:
        if delta.section is Section.REASONING:
            said.reasoning += delta.text
        elif delta.section is Section.ANSWER:
            said.answer += delta.text
        else:
            if delta.index == len(said.calls):
                said.calls.append(("", "", False))
            old = said.calls[delta.index]
            assert not (old[0] and delta.name), f"{name}: a call's name came twice"
            said.calls[delta.index] = (old[0] + delta.name, old[1] + delta.text, old[2] or delta.malformed)
    assert said == expected, f"{name}: {said} is not {expected} for {stream}"
    assert [i for d in deltas for i in d.token_ids] == stream.ids[: said.num_counted], (
        f"{name}: ids are lost or doubled"
    )


def whole(stream: Stream) -> Said:
    """The definition: runs of ids between tags, each decoded at once."""
    special, ids, state = tokenizer().special_ids, stream.ids, stream.state
    said, at = Said(), 0
    lead = stream.strip or state is not State.OPEN
    while True:
        if state is State.REASONING:
            end = _find(ids, at, special.end_think)
            said.reasoning += tokenizer().decode(ids[at:end]).strip("\n")
            if end == len(ids):
                break
            at, state, lead = end + 1, State.OPEN, True
            continue
        opener = special.think if state is State.OPEN else None
        end = min(_find(ids, at, opener), _find(ids, at, special.tool_call if stream.tools else None))
        text, num_taken = _answer(ids[at:end], stream.stop, lead=lead, trail=stream.strip)
        said.answer += text
        if num_taken is not None:
            said.num_counted = at + num_taken
            return said
        if end == len(ids):
            break
        if ids[end] == opener:
            at, state = end + 1, State.REASONING
            continue
        at = end
        while at < len(ids) and ids[at] == special.tool_call:  # a call that another one opens behind is over
            end = min(_find(ids, at + 1, special.end_tool_call), _find(ids, at + 1, special.tool_call))
            said.calls.append(_call(ids[at + 1 : end]))
            at = end
        if at == len(ids):
            break
        at, lead = at + 1, True
    said.num_counted = len(ids)
    return said


def _answer(ids: list[int], stops: tuple[str, ...], *, lead: bool, trail: bool) -> tuple[str, int | None]:
    """Text of a run of answer ids, and how many of them count where a stop string ended it."""
    text = _led(tokenizer().decode(ids), lead)
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    num_taken = None
    if ends:
        end, length = min(ends)
        num_taken = next(n for n in range(1, len(ids) + 1) if len(_led(_settled(ids[:n]), lead)) >= end)
        text = text[: end + length]
    return (text.rstrip("\n") if trail else text), num_taken


def _settled(ids: list[int]) -> str:
    """What these ids say for sure: an unfinished character at their end says nothing yet."""
    pieces = b"".join(tokenizer().piece(i) for i in ids if i not in tokenizer().special_ids.special)
    return codecs.getincrementaldecoder("utf-8")("replace").decode(pieces)


def _led(text: str, lead: bool) -> str:
    return text.lstrip("\n") if lead else text


def _call(ids: list[int]) -> tuple[str, str, bool]:
    parser = ToolCallParser()
    given = parser.push(tokenizer().decode(ids))
    piece, call = parser.finish()
    return call.name, given + piece, call.malformed


def _find(ids: list[int], at: int, token_id: int | None) -> int:
    return len(ids) if token_id is None or token_id not in ids[at:] else ids.index(token_id, at)


def _pieces(numbers: Random, length: int, way: int) -> list[int]:
    """Ends of the pieces: one id at a time, all at once, else random ones, empty pieces too."""
    if way == 0:
        return list(range(1, length + 1)) or [0]
    if way == 1:
        return [length]
    return [*sorted(numbers.randint(0, length) for _ in range(numbers.randint(1, 12))), length]


@cache
def _encoded(text: str) -> list[int]:
    return tokenizer().encode(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=SystemRandom().getrandbits(32))
    parser.add_argument("--cuts", type=int, default=100_000)
    arguments = parser.parse_args()
    try:
        print(json.dumps(run(arguments.seed, arguments.cuts)))
    except AssertionError as error:
        print(json.dumps({"seed": arguments.seed, "finding": str(error)}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
