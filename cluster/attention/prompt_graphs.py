"""Steps that hold prompts, in CUDA graphs but for their attention.

Why: launched one by one, the eleven kernels of a layer take the host as long as a small step takes the GPU, and longer
where other threads want the interpreter. Attention's grid follows from the lengths of a step's requests; everything
else has a number of tokens and no more. So what stands between two attentions is one graph (`device_model.Line`'s
pieces), a step is padded to its header's bucket, and attention is planned and launched as in any other step, for the
tokens that are there. Padding rows are routed nowhere, written nowhere and attend to nothing.

A bucket runs eagerly, in the same shapes, the first time it is met, and is captured the second time: no step waits for
both. A replica has met all of them before it serves (`warm_up.py`). Of too many sets the one used longest ago is
dropped. Steps above the largest bucket hide their launches.
Idea: vLLM's piecewise graphs."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

from ...router.device_step import DeviceStep
from ...router.leader import PROMPT_BUCKETS
from .device_model import AttentionRooms, DeviceBatch, DeviceModel, KVPages, Line
from .flash import FlashAttention

MOST_TOKENS = PROMPT_BUCKETS[-1]
MAX_SETS = 32  # buckets, and those of the exchange and experts before a change


@dataclass(frozen=True, slots=True)
class _Captured:
    """The pieces of one bucket; memory that lives between them is the pool's, since pieces are replayed in order."""

    pieces: list[torch.cuda.CUDAGraph]
    x: torch.Tensor  # [padded(bucket), hidden], where the last piece writes


class PromptGraphs:
    """Engine thread only."""

    def __init__(
        self,
        model: DeviceModel,
        kv_pages: KVPages,
        attention: FlashAttention,
        *,
        pool: Any,  # torch.cuda.graph_pool_handle()
        stream: torch.cuda.Stream,
    ) -> None:
        """`pool`: of graphs that are never replayed at the same time; `stream`: where to capture."""
        self._model, self._kv_pages, self._attention = model, kv_pages, attention
        self._pool, self._stream = pool, stream
        self._rooms = AttentionRooms.of(model, MOST_TOKENS)  # of all buckets and layers
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._met: set[Hashable] = set()  # keys that have run eagerly
        self.num_captures = self.num_replays = 0

    def run(
        self, batch: DeviceBatch, num_tokens: int, step: DeviceStep, last_token: torch.Tensor
    ) -> tuple[torch.Tensor, bool]:
        """`batch`: `T` rows at fixed addresses, the first `num_tokens` of them real and planned for. -> x [padded(T),
        hidden] of the last norm, valid until the next run, and whether it was replayed."""
        bucket = batch.token_ids.shape[0]
        rooms = self._rooms_of(bucket)
        key = None if step.graph_key is None else (bucket, step.graph_key)
        captured = self._captured.get(key)
        if captured is None and key in self._met:
            captured = self._capture(key, self._line(batch, step, last_token, rooms), step)
        if captured is None:
            if key is not None:
                self._met.add(key)
            line = self._line(batch, step, last_token, rooms)
            self._interleave(line.run, rooms, num_tokens)
            return line.x, False
        self._captured.move_to_end(key)
        pieces = captured.pieces
        self._interleave(lambda piece: pieces[piece].replay(), rooms, num_tokens)
        step.replayed()
        self.num_replays += 1
        return captured.x, True

    def _interleave(self, run: Callable[[int], None], rooms: AttentionRooms, num_tokens: int) -> None:
        """Pieces, and attention for the real tokens between them."""
        attend, q = self._attention.attend, rooms.q[:num_tokens]
        out = rooms.mixed[:num_tokens].view(q.shape)
        run(0)
        for layer_id, cache in enumerate(self._kv_pages):
            attend(q, *cache, out=out)
            run(layer_id + 1)

    def _line(self, batch: DeviceBatch, step: DeviceStep, last_token: torch.Tensor, rooms: AttentionRooms) -> Line:
        return self._model.line(batch, self._kv_pages, step, last_token=last_token, rooms=rooms)

    def _rooms_of(self, bucket: int) -> AttentionRooms:
        return AttentionRooms(self._rooms.q[:bucket], self._rooms.mixed[: self._model.products.padded(bucket)])

    def _capture(self, key: Hashable, line: Line, step: DeviceStep) -> _Captured:
        """Thread-local mode: other threads load experts meanwhile, which allocates."""
        pieces = []
        self._stream.wait_stream(torch.cuda.current_stream(self._model.device))
        with torch.cuda.stream(self._stream):
            for piece in range(len(self._kv_pages) + 1):
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    line.run(piece)
                finally:
                    graph.capture_end()
                step.captured(graph)
                pieces.append(graph)
        self.num_captures += 1
        captured = self._captured[key] = _Captured(pieces, line.x)
        while len(self._captured) > MAX_SETS:
            self._met.discard(self._captured.popitem(last=False)[0])
        return captured


def bucket_of(num_tokens: int, header_bucket: int) -> int:
    """The bucket of a rank's tokens in a step whose header names one, that of the largest source: the smallest that
    holds them. 0 = the step is too large, or has none."""
    own = next((size for size in PROMPT_BUCKETS if size >= num_tokens), 0)
    return min(own, header_bucket)
