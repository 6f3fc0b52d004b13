"""What a stream was given and has not taken yet: 4 bytes a token, in pieces when it is taken, with an end.

Why not the link's records as they came: a record keeps the whole message of its step alive, and merging into it leaves
every smaller copy behind in protobuf's arena; a list of Python's ints costs 36 bytes a token. Log-probabilities wait
as their bytes, as objects they are ten times as large.

Why pieces: a client that comes back after thousands of tokens would get them as one event, perhaps larger than it
accepts, and while they are made into text all other streams of the process wait."""

from array import array
from collections import deque

from ...proto import expertmesh_pb2 as pb
from ...request import FinishReason, RequestOutput
from .link_messages import decode_logprob

PIECE_TOKENS = 256  # at most in one output, so in one event
ID_BYTES = 4
LOGPROB_BYTES = 48  # of an entry beside its own bytes: an object's head and its place in the queue


class Backlog:
    """`add` records of the link, `take` outputs; false while there is nothing to take."""

    __slots__ = ("_finish_reason", "_fresh", "_ids", "_logprob_bytes", "_logprobs", "_num_cached_tokens", "_queue_s")

    def __init__(self, *, with_logprobs: bool) -> None:
        self._ids = array("i")
        self._logprobs: deque[bytes] | None = deque() if with_logprobs else None
        self._logprob_bytes = 0
        self._finish_reason = FinishReason.NONE
        self._num_cached_tokens = 0
        self._queue_s = 0.0
        self._fresh = False  # something came since the last piece was taken

    def __bool__(self) -> bool:
        return self._fresh

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    @property
    def num_bytes(self) -> int:
        return ID_BYTES * len(self._ids) + self._logprob_bytes

    def add(self, tokens: pb.RequestTokens) -> None:
        self._fresh = True
        self._ids.extend(tokens.token_ids)
        if tokens.finish_reason:
            self._finish_reason = FinishReason(tokens.finish_reason)
        if tokens.queue_s or tokens.num_cached_tokens:
            self._queue_s, self._num_cached_tokens = tokens.queue_s, tokens.num_cached_tokens
        if self._logprobs is not None:
            for logprob in tokens.logprobs:
                data = logprob.SerializeToString()
                self._logprobs.append(data)
                self._logprob_bytes += len(data) + LOGPROB_BYTES

    def take(self, request_id: str) -> RequestOutput:
        """The next piece; the end is told with the last one."""
        output = RequestOutput(request_id, self._ids[:PIECE_TOKENS].tolist())
        del self._ids[:PIECE_TOKENS]
        if self._logprobs:
            for _ in output.token_ids:
                data = self._logprobs.popleft()
                output.logprobs.append(decode_logprob(pb.TokenLogprob.FromString(data)))
                self._logprob_bytes -= len(data) + LOGPROB_BYTES
        if self._queue_s or self._num_cached_tokens:
            output.queue_s, output.num_cached_tokens = self._queue_s, self._num_cached_tokens
            self._queue_s, self._num_cached_tokens = 0.0, 0
        self._fresh = bool(self._ids)
        if not self._fresh:
            output.finish_reason = self._finish_reason
        return output
