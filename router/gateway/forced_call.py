"""A tool call that must come: where the model has done its thinking, the call's beginning is put in its mouth.

A turn that would end inside its thinking has done it too: the block is closed in place of the end.

The stream is cut at the first token of the answer and goes on, as after a failover, from the tokens so far plus the
forced ones. They are output like any other: counted, in the prefix cache, in the journal. The cut depends on accepted
ids alone, so however the stream came in pieces, and whoever goes on with it, it says the same."""

import json
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Protocol

from ...request import EngineRequest, FinishReason, RequestOutput, TokenLogprob
from .conversation import State
from .tokenizer import Tokenizer


class Stream(Protocol):
    @property
    def replica_id(self) -> str: ...

    async def __anext__(self) -> RequestOutput: ...

    def abort(self) -> None: ...


def call_beginning(tokenizer: Tokenizer, name: str = "") -> tuple[int, ...]:
    """Ids that open a call, of the tool `name` where one is given."""
    head = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments":' if name else '{"name": "'
    return tuple(tokenizer.encode(f"<tool_call>\n{head}"))


class CallFinder:
    """Where the forced call goes in a stream of accepted ids."""

    __slots__ = ("_end_think", "_ends", "_inside", "_separator", "_think", "found")

    def __init__(self, state: State, tokenizer: Tokenizer, stop_ids: frozenset[int] = frozenset()) -> None:
        """`stop_ids` end the text where they come; of them the model's own are not let end a block of thinking."""
        special = tokenizer.special_ids
        self._inside = state is State.REASONING
        self._think = special.think if state is State.OPEN else None
        self._end_think = special.end_think
        self._ends = special.eos & stop_ids
        self._separator = tuple(tokenizer.encode("\n\n"))  # what stands behind a think block
        self.found = False

    def find(self, token_ids: Sequence[int]) -> tuple[int, tuple[int, ...]] | None:
        """Take the next ids: how many of them stay and what separates the call from them, once."""
        if self.found:
            return None
        for index, token_id in enumerate(token_ids):
            if self._inside:
                if token_id == self._end_think:
                    self.found = True
                    return index + 1, self._separator
                if token_id in self._ends and self._end_think is not None:
                    self.found = True
                    return index, (self._end_think, *self._separator)
            elif token_id == self._think:
                self._inside = True
            else:
                self.found = True
                return index, ()
        return None


class ForcedCallStream(AsyncIterator[RequestOutput]):
    """Outputs of one request whose answer begins with `beginning`."""

    def __init__(
        self,
        submit: Callable[[EngineRequest], Stream],
        request: EngineRequest,
        beginning: tuple[int, ...],
        finder: CallFinder,
    ) -> None:
        """`request.output_ids` (a stream resumed) may hold the forced tokens already."""
        self._submit, self._request, self._beginning, self._finder = submit, request, beginning, finder
        self._ids = array("i", request.output_ids)
        finder.find(self._ids)
        self._stream = submit(request)
        self._closed = False

    @property
    def replica_id(self) -> str:
        return self._stream.replica_id

    def abort(self) -> None:
        self._closed = True
        self._stream.abort()

    async def __anext__(self) -> RequestOutput:
        output = await self._stream.__anext__()
        cut = self._finder.find(output.token_ids)
        if cut is None:
            self._ids.extend(output.token_ids)
            return output
        num_kept, separator = cut
        kept, logprobs = output.token_ids[:num_kept], output.logprobs[:num_kept]
        room = self._request.sampling.max_tokens - len(self._ids) - len(kept)
        forced = [*separator, *self._beginning][:room]
        if self._request.sampling.num_logprobs >= 0:
            logprobs += [TokenLogprob(i, 0.0) for i in forced]
        self._ids.extend([*kept, *forced])
        self._stream.abort()
        ended = len(forced) == room
        if not ended and not self._closed:
            self._stream = self._submit(replace(self._request, output_ids=tuple(self._ids)))
        return replace(
            output,
            token_ids=[*kept, *forced],
            logprobs=logprobs,
            finish_reason=FinishReason.LENGTH if ended else FinishReason.NONE,
        )
