"""State machine over the accepted tokens of one generation: thinking, answer, stop strings, usage. Pure.

It starts from the state that the rendered prompt left (`prompt_state`), reads ids as they are accepted and gives deltas
of text. Sections are told by token id, never by text:

    OPEN --think--> REASONING --end_think--> OPEN       CLOSED: the prompt ended the block, all is answer, tags are text

A prompt that opened the block starts in REASONING (Thinking-2507), one that closed it in CLOSED (the hard switch), any
other in OPEN. Promise: however the stream is cut into pushes, the joined deltas equal what the whole text gives. Held
back until decided: bytes of an unfinished character, a possible beginning of a stop string, and newlines that a tag or
the end may strip (tags and the newlines around them are in neither text).

Stop strings are looked for in the answer only, as a newline in somebody's thoughts must not end the reply. The first
to be complete wins, of several the longest; tokens after the one that completed it are dropped and never counted.

Where the model was given tools, `tool_call` opens a call from OPEN and CLOSED, never from REASONING, and
`end_tool_call`, another `tool_call` or the end closes it (`tool_calls.py`); the state that it came from goes on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum, auto

from ...request import TokenLogprob
from .tokenizer import Detokenizer, SpecialIds, Tokenizer
from .tool_calls import ToolCall, ToolCallParser


class Section(IntEnum):
    """What a delta belongs to."""

    REASONING = 0
    ANSWER = 1
    TOOL_CALL = 2


class State(Enum):
    OPEN = auto()  # answer text; a think tag opens a block
    REASONING = auto()
    CLOSED = auto()  # answer text, no block to come


@dataclass(slots=True)
class Delta:
    """A piece of one section. Its last ids may belong to text that is still held back.

    Of a tool call `text` is a piece of its arguments; `name` is in one delta of it, `malformed` may be in its last."""

    section: Section
    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    index: int = 0  # of the tool call
    name: str = ""
    malformed: bool = False


def prompt_state(prompt_ids: Sequence[int], special: SpecialIds) -> State:
    """Where the prompt leaves the model: the last think tag that no end of a turn follows decides."""
    for token_id in reversed(prompt_ids):
        if token_id == special.end_think:
            return State.CLOSED
        if token_id == special.think:
            return State.REASONING
        if token_id in special.eos:
            break
    return State.OPEN


class Conversation:
    """One generation. `push` accepted ids until `stopped`, then `finish` once."""

    __slots__ = (
        "_call",
        "_call_name",
        "_detokenizer",
        "_end_call_id",
        "_end_think_id",
        "_logprobs",
        "_newlines",
        "_parts",
        "_stop_ids",
        "_stops",
        "_strip_end",
        "_strip_start",
        "_think_id",
        "_token_ids",
        "_tool_call_id",
        "completion_tokens",
        "reasoning_tokens",
        "state",
        "stop_matched",
        "tool_calls",
    )

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        state: State = State.OPEN,
        stop: Sequence[str] = (),
        stop_ids: frozenset[int] = frozenset(),
        strip_answer: bool = True,
        tools: bool = False,
    ) -> None:
        """`stop_ids` end the text without being part of it. `strip_answer` False (plain completions) keeps newlines at
        the answer's ends, other than those after a think block. `tools`: calls are parsed, else their tags are text."""
        self.state = state
        self.stop_matched = ""
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self._detokenizer = Detokenizer(tokenizer)
        self._think_id = tokenizer.special_ids.think
        self._end_think_id = tokenizer.special_ids.end_think
        self.tool_calls: list[ToolCall] = []  # that ended
        self._tool_call_id = tokenizer.special_ids.tool_call if tools else None
        self._end_call_id = tokenizer.special_ids.end_tool_call if tools else None
        self._call: ToolCallParser | None = None  # the call that is open
        self._call_name = ""  # of it, once told
        self._stop_ids = stop_ids
        self._stops = StopFinder(stop) if stop else None
        self._strip_start = strip_answer or state is not State.OPEN  # leading newlines of the section are dropped
        self._strip_end = strip_answer  # trailing newlines of the answer too
        self._newlines = ""  # held back: dropped if the section ends here
        self._parts: list[str] = []  # text of the section in this push
        self._token_ids: list[int] = []  # of the section, not yet in a delta
        self._logprobs: list[TokenLogprob] = []

    @property
    def stopped(self) -> bool:
        return bool(self.stop_matched)

    def push(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> list[Delta]:
        """Accept ids; nothing is accepted after a stop string. `logprobs` is empty or one an id."""
        if len(token_ids) == 1 and not logprobs:
            delta = self._push_plain(token_ids[0])
            if delta is not None:
                return [delta]
        deltas: list[Delta] = []
        for index, token_id in enumerate(token_ids):
            if self.stop_matched:
                break
            self.completion_tokens += 1
            ends = False
            if self.state is State.REASONING:
                self.reasoning_tokens += 1
                ends = token_id == self._end_think_id
            elif token_id == self._tool_call_id:
                self._close_section(deltas)
                self._call = ToolCallParser()
                self._keep(token_id, logprobs, index)
                continue
            elif self._call is not None:
                ends = token_id == self._end_call_id
            elif token_id == self._think_id and self.state is State.OPEN:
                self._open_block(deltas)
                self._keep(token_id, logprobs, index)
                continue
            self._keep(token_id, logprobs, index)
            if ends:
                in_call = self._call is not None
                self._close_section(deltas)
                if not in_call:
                    self.state = State.OPEN
                self._strip_start = True
            elif token_id not in self._stop_ids:
                text = self._detokenizer.push(token_id)
                if text:
                    self._write(text)
        if self._parts or (self._call is not None and self._call.name != self._call_name):
            self._emit(deltas)
        return deltas

    def finish(self) -> list[Delta]:
        """The end: what was held back is decided. Call once."""
        deltas: list[Delta] = []
        self._close_section(deltas)
        return deltas

    def _push_plain(self, token_id: int) -> Delta | None:
        """The common case in one go: whole characters, nothing held back or looked for. None = the long way."""
        if self._stops is not None or self._strip_start or self._newlines or self._token_ids or self._call is not None:
            return None
        if token_id == self._think_id or token_id == self._end_think_id or token_id in self._stop_ids:
            return None
        if token_id == self._tool_call_id:
            return None
        text = self._detokenizer.plain(token_id)
        if not text or text[-1] == "\n":
            return None
        self.completion_tokens += 1
        if self.state is State.REASONING:
            self.reasoning_tokens += 1
            return Delta(Section.REASONING, text, [token_id])
        return Delta(Section.ANSWER, text, [token_id])

    def _keep(self, token_id: int, logprobs: Sequence[TokenLogprob], index: int) -> None:
        self._token_ids.append(token_id)
        if logprobs:
            self._logprobs.append(logprobs[index])

    def _open_block(self, deltas: list[Delta]) -> None:
        self._close_section(deltas)
        self.state = State.REASONING
        self._strip_start = True
        self.reasoning_tokens += 1

    def _write(self, text: str) -> None:
        """Text (not empty) of the present section, past the rules about newlines and stop strings."""
        if self._call is not None:
            if piece := self._call.push(text):
                self._parts.append(piece)
            return
        if self._strip_start:
            text = text.lstrip("\n")
            if not text:
                return
            self._strip_start = False
        reasoning = self.state is State.REASONING
        if self._stops is not None and not reasoning:
            text = self._stops.push(text)
            self.stop_matched = self._stops.matched
            if not text:
                return
        if (self._newlines or text[-1] == "\n") and (reasoning or self._strip_end):
            text = self._newlines + text
            kept = text.rstrip("\n")
            self._newlines = text[len(kept) :]
            text = kept
        if text:
            self._parts.append(text)

    def _close_section(self, deltas: list[Delta]) -> None:
        if not self.stop_matched:
            if held := self._detokenizer.flush():
                self._write(held)
            if self._call is not None:
                self._close_call(deltas)
                return
            if self._stops is not None and self.state is not State.REASONING:
                self._release_stops()
        self._newlines = ""
        if self._parts or self._token_ids:
            self._emit(deltas)

    def _release_stops(self) -> None:
        assert self._stops is not None
        stops, self._stops = self._stops, None
        if held := stops.flush():
            self._write(held)
        self._stops = stops

    def _close_call(self, deltas: list[Delta]) -> None:
        assert self._call is not None
        piece, call = self._call.finish()
        if piece:
            self._parts.append(piece)
        self._emit(deltas)
        deltas[-1].malformed = call.malformed
        self.tool_calls.append(call)
        self._call, self._call_name = None, ""

    def _emit(self, deltas: list[Delta]) -> None:
        if self._call is not None:
            delta = Delta(Section.TOOL_CALL, "".join(self._parts), self._token_ids, self._logprobs)
            delta.index = len(self.tool_calls)
            if self._call.name != self._call_name:
                self._call_name = delta.name = self._call.name
            deltas.append(delta)
            self._parts, self._token_ids, self._logprobs = [], [], []
            return
        section = Section.REASONING if self.state is State.REASONING else Section.ANSWER
        deltas.append(Delta(section, "".join(self._parts), self._token_ids, self._logprobs))
        self._parts, self._token_ids, self._logprobs = [], [], []


class StopFinder:
    """Finds the first of some strings to be complete in a text that comes in pieces, by Knuth-Morris-Pratt automata.

    Because the automata go character by character, where the text is cut cannot matter."""

    __slots__ = ("_failures", "_held", "_matched_lengths", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(sorted(set(stops), key=len, reverse=True))  # of those complete at once the longest wins
        self._failures = tuple(_failure(stop) for stop in self._stops)
        self._matched_lengths = [0] * len(self._stops)
        self._held = ""
        self.matched = ""

    def push(self, text: str) -> str:
        """The text that no stop string can claim any more. Once `matched`, the rest is gone."""
        lengths = self._matched_lengths
        for position, char in enumerate(text):
            for k, stop in enumerate(self._stops):
                length = lengths[k]
                while length and stop[length] != char:
                    length = self._failures[k][length - 1]
                if stop[length] == char:
                    length += 1
                if length == len(stop):
                    self.matched = stop
                    whole = self._held + text[: position + 1]
                    self._held = ""
                    return whole[: len(whole) - length]
                lengths[k] = length
        whole = self._held + text
        held = max(lengths)
        self._held = whole[len(whole) - held :]
        return whole[: len(whole) - held]

    def flush(self) -> str:
        """The end of the text: an unfinished stop string was text."""
        held, self._held = self._held, ""
        self._matched_lengths = [0] * len(self._stops)
        return held


def _failure(stop: str) -> tuple[int, ...]:
    """Length of the longest proper prefix that is also a suffix, for every prefix of `stop`."""
    table = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = table[length - 1]
        if stop[i] == stop[length]:
            length += 1
        table[i] = length
    return tuple(table)
