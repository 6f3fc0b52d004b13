"""The answer's grammar in the engine: compiled off the step's path, then a fold over accepted tokens that masks ids.

    INSIDE   a think block is open: free, but the turn may not end there
    OPENING  the answer has not begun: its first tokens, or what may stand before it (a block, a separator, a call)
    ANSWER   what the grammar allows; the end of the turn where it is complete
    FREE     the model has begun a tool call, or the answer has ended

Like the thinking budget (`thinking.py`) the state follows from accepted tokens alone, so preemption, a step run twice
and failover rebuild it by accepting the same tokens. Tokens that the budget forces are no part of the answer.

A grammar is compiled once per replica, in a thread, before its request is queued: seconds, for bounded strings and a
large vocabulary. The mask of the next token is filled in a thread too, from the moment when the last one was accepted:
the library lets go of the interpreter, so other rows' work goes on meanwhile.
Idea: XGrammar (Dong et al., 2024), whose library does both."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...errors import ExpertMeshError, InvalidRequest, QueueFull
from ...request import AnswerGrammar
from ...router.gateway.tokenizer import Tokenizer
from ...router.grammar import library, parse

MAX_CACHED_BYTES = 128 << 20  # of compiled grammars
MAX_WAITING = 64  # requests whose grammar is being compiled
NUM_THREADS = 2


class Phase(Enum):
    INSIDE = auto()
    OPENING = auto()
    ANSWER = auto()
    FREE = auto()


class Matcher(Protocol):
    """Where in the grammar an answer is (`xgrammar.GrammarMatcher`)."""

    def accept_token(self, token_id: int) -> bool: ...

    def fill_next_token_bitmask(self, bitmask: Any, index: int = 0) -> bool: ...


class GrammarState:
    """Of one request. Engine thread only."""

    __slots__ = ("_before", "_bits", "_fill_in", "_filling", "_grammar", "_matcher", "_never_end", "_stop_ids", "phase")

    def __init__(
        self,
        grammar: AnswerGrammar,
        matcher: Matcher,
        *,
        vocab_size: int,
        stop_ids: frozenset[int],
        fill_in: ThreadPoolExecutor | None = None,
    ) -> None:
        self._grammar, self._matcher, self._stop_ids, self._fill_in = grammar, matcher, stop_ids, fill_in
        self.phase = Phase.INSIDE if grammar.starts_inside else Phase.OPENING
        self._before = {i for i in (grammar.think_id, grammar.tool_call_id) if i >= 0}  # instead of the first token
        self._bits = np.zeros((1, -(-vocab_size // 32)), np.int32)
        self._never_end = np.full_like(self._bits, -1)
        for stop_id in stop_ids:
            self._never_end[0, stop_id >> 5] &= ~np.int32(_bit(stop_id))
        self._filling: Future[None] | None = None
        self._fill_ahead()

    def accept(self, token_id: int, *, forced: bool = False) -> None:
        """Take the next accepted token; `forced` where the thinking budget set it."""
        grammar = self._grammar
        if self.phase is Phase.FREE:
            return
        if self.phase is Phase.INSIDE:
            if token_id == grammar.end_think_id:
                self.phase = Phase.OPENING
                self._before = {i for i in (grammar.separator_id, grammar.tool_call_id) if i >= 0}
        elif forced:  # what the closing sentence has behind the block
            self._before.discard(grammar.separator_id)
        elif self.phase is Phase.OPENING and token_id in self._before:
            if token_id == grammar.think_id:
                self.phase = Phase.INSIDE
            elif token_id == grammar.tool_call_id:
                self.phase = Phase.FREE
            else:
                self._before.discard(token_id)
        else:
            self.phase = Phase.ANSWER
            self._wait()
            accepted = self._matcher.accept_token(token_id)
            assert accepted, f"the grammar does not allow token {token_id}"
            if token_id in self._stop_ids:
                self.phase = Phase.FREE
        self._fill_ahead()

    def mask(self) -> np.ndarray | None:
        """[ceil(vocab_size / 32)] int32: bit i & 31 of word i >> 5 says that id i may come; None = any."""
        if self.phase is Phase.FREE:
            return None
        if self.phase is Phase.INSIDE:
            return self._never_end[0]
        self._wait()
        if self.phase is Phase.ANSWER or not self._before:
            return self._bits[0]
        bits = self._bits[0].copy()
        for token_id in self._before:
            bits[token_id >> 5] |= np.int32(_bit(token_id))
        return bits

    def _fill_ahead(self) -> None:
        """Begin to fill the mask, where one will be asked for."""
        if self.phase in (Phase.OPENING, Phase.ANSWER):
            self._wait()
            if self._fill_in is None:
                self._fill()
            else:
                self._filling = self._fill_in.submit(self._fill)

    def _fill(self) -> None:
        self._bits.fill(-1)
        self._matcher.fill_next_token_bitmask(self._bits)

    def _wait(self) -> None:
        if self._filling is not None:
            self._filling.result()
            self._filling = None


def _bit(token_id: int) -> int:
    """1 << (id & 31) as a signed 32-bit number."""
    bit = 1 << (token_id & 31)
    return bit - (1 << 32) if bit >= 1 << 31 else bit


Compiled = Callable[[], GrammarState]
Done = Callable[[Compiled | ExpertMeshError], None]


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    compiler: Any  # xgrammar.GrammarCompiler
    stop_ids: frozenset[int]


class GrammarCompiler:
    """Compiled grammars of one replica, the least recently used ones forgotten first. Thread-safe."""

    def __init__(
        self,
        tokenizer: Callable[[], Tokenizer],
        vocab_size: int,
        *,
        max_cached_bytes: int = MAX_CACHED_BYTES,
    ) -> None:
        """`tokenizer` is called once, by the first request with a grammar; ids from `vocab_size` on are never drawn."""
        self._tokenizer, self._vocab_size, self._max_cached_bytes = tokenizer, vocab_size, max_cached_bytes
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[str, str], Any] = OrderedDict()  # xgrammar.CompiledGrammar
        self._num_cached_bytes = 0
        self._compiling: dict[tuple[str, str], Future[Any]] = {}
        self._num_waiting = 0
        self._vocabulary: _Vocabulary | None = None
        self._vocabulary_lock = threading.Lock()
        self._compile_in = ThreadPoolExecutor(NUM_THREADS, "grammar")
        self._fill_in = ThreadPoolExecutor(NUM_THREADS, "grammar mask")

    @classmethod
    def for_checkpoint(cls, folder: str | Path, vocab_size: int) -> "GrammarCompiler":
        """`vocab_size` ids are drawn from; the tokenizer is read when the first grammar comes."""
        return cls(lambda: Tokenizer.for_checkpoint(folder), vocab_size)

    @property
    def num_cached_bytes(self) -> int:
        return self._num_cached_bytes

    def compile(self, grammar: AnswerGrammar, done: Done) -> None:
        """`done` gets what makes the state of a request, or the error: at once where the grammar is known, else later
        from another thread. QueueFull where too many wait."""
        key = (grammar.kind, grammar.source)
        with self._lock:
            known = self._cache.get(key)
            if known is None:
                if self._num_waiting >= MAX_WAITING:
                    raise QueueFull(f"{self._num_waiting} requests wait for their grammar here; retry later")
                self._num_waiting += 1
                future = self._compiling.get(key)
                if future is None:
                    future = self._compiling[key] = self._compile_in.submit(self._compile, grammar, key)
            else:
                self._cache.move_to_end(key)
        if known is not None:
            done(self._state_of(grammar, known))
            return

        assert future is not None
        future.add_done_callback(lambda ended: self._tell(grammar, ended, done))

    def close(self) -> None:
        """Nothing new is compiled; what waits hears nothing more."""
        for pool in (self._compile_in, self._fill_in):
            pool.shutdown(wait=False, cancel_futures=True)

    def _tell(self, grammar: AnswerGrammar, ended: Future[Any], done: Done) -> None:
        with self._lock:
            self._num_waiting -= 1
        if ended.cancelled():
            return
        error = ended.exception()
        if error is None:
            done(self._state_of(grammar, ended.result()))
        elif isinstance(error, ExpertMeshError):
            done(error)
        else:
            done(InvalidRequest(f"response_format.{grammar.kind}", grammar.source, f"one that compiles: {error}"))

    def _compile(self, grammar: AnswerGrammar, key: tuple[str, str]) -> Any:
        try:
            compiled = self._load().compiler.compile_grammar(parse(grammar))
            first = np.zeros((1, -(-self._vocab_size // 32)), np.int32)
            if library().GrammarMatcher(compiled).fill_next_token_bitmask(first) and not first.any():
                raise InvalidRequest(f"response_format.{grammar.kind}", grammar.source, "one that a text can match")
            with self._lock:
                self._cache[key] = compiled
                self._num_cached_bytes += compiled.memory_size_bytes
                while self._num_cached_bytes > self._max_cached_bytes and len(self._cache) > 1:
                    self._num_cached_bytes -= self._cache.popitem(last=False)[1].memory_size_bytes
            return compiled
        finally:
            with self._lock:
                del self._compiling[key]

    def _load(self) -> _Vocabulary:
        with self._vocabulary_lock:
            if self._vocabulary is None:
                xgrammar, tokenizer = library(), self._tokenizer()
                size = min(self._vocab_size, tokenizer.vocab_size)
                tags = tokenizer.added_ids  # what a token of their own means must not be said as text
                pieces = [b"" if i in tags else tokenizer.piece(i) for i in range(size)]
                stop_ids = frozenset(i for i in tokenizer.special_ids.eos if i < size)
                info = xgrammar.TokenizerInfo(
                    pieces, xgrammar.VocabType.RAW, vocab_size=self._vocab_size, stop_token_ids=sorted(stop_ids)
                )
                compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
                self._vocabulary = _Vocabulary(compiler, stop_ids)
            return self._vocabulary

    def _state_of(self, grammar: AnswerGrammar, compiled: Any) -> Compiled:
        stop_ids = self._load().stop_ids

        def make() -> GrammarState:
            matcher = library().GrammarMatcher(compiled)
            return GrammarState(grammar, matcher, vocab_size=self._vocab_size, stop_ids=stop_ids, fill_in=self._fill_in)

        return make
