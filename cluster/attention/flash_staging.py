"""How a plan of `flash.py` reaches the GPU: pinned memory in turns, and the fixed layout of a bucket's form.

A piece of pinned memory is written again only when the copy from it is done, so the next step is planned while this
one runs. A `Form` knows what its arrays hold when nothing special is the case; a plan copies that and writes what
changed: lengths, block table, and where contexts are cut the items. No more is a decode step's plan."""

import numpy as np
import torch

from ...kernels.paged_attention import AttentionCall

TURNS = 4  # copies that may be ahead of the GPU


class Staging:
    """Pinned int32 memory of any size, in turns."""

    def __init__(self, device: torch.device, turns: int = TURNS) -> None:
        self.cuda = device.type == "cuda"
        self._pieces = [torch.empty(0, dtype=torch.int32) for _ in range(turns)]
        self._sent: list[torch.cuda.Event | None] = [None] * turns
        self._turn = 0

    def reserve(self, size: int) -> None:
        """Before the first plan: the driver takes milliseconds for pinned memory; no step should wait for that."""
        self._pieces = [torch.empty(size, dtype=torch.int32, pin_memory=self.cuda) for _ in self._pieces]

    def take(self, size: int) -> np.ndarray:
        """[size] int32 to write; `send` follows."""
        self._turn = (self._turn + 1) % len(self._pieces)
        event = self._sent[self._turn]
        if event is not None:
            event.synchronize()  # done long since, unless plans outrun the GPU
        piece = self._pieces[self._turn]
        if len(piece) < size:
            room = 1 << (size - 1).bit_length()
            piece = self._pieces[self._turn] = torch.empty(room, dtype=torch.int32, pin_memory=self.cuda)
        view: np.ndarray = piece.numpy()[:size]
        return view

    def send(self, size: int, to: torch.Tensor) -> None:
        to.copy_(self._pieces[self._turn][:size], non_blocking=True)
        if self.cuda:
            event = self._sent[self._turn]
            if event is None:
                event = self._sent[self._turn] = torch.cuda.Event()
            event.record(torch.cuda.current_stream(to.device))


class Form:
    """One form of a bucket of `B` requests: where its arrays lie, always, and the call that reads them.

    Request B has no tokens: items beyond those of a plan are its. Rows of the bucket beyond the step's requests have
    one query and no KV."""

    def __init__(self, bucket: int, num_items: int, cut: bool, call: AttentionCall | None, fixed: torch.Tensor) -> None:
        """`call`: None where a kernel reads the arrays of `requests` alone."""
        self.bucket, self.num_items, self.cut, self.call = bucket, num_items, cut, call
        sizes = {"q_starts": bucket + 1, "q_lens": bucket + 1, "kv_lens": bucket + 1, "page_starts": bucket + 2}
        sizes |= {"item_request": num_items, "item_q_tile": num_items, "item_chunk": num_items, "chunk_size": 1}
        if cut:
            sizes |= {"o_starts": bucket + 1, "merge_starts": bucket + 1}
        offsets = np.cumsum([0, *sizes.values()]).tolist()
        self._at = {name: slice(a, b) for name, a, b in zip(sizes, offsets, offsets[1:])}
        self.num_fixed = offsets[-1]
        pages = fixed[self.num_fixed :]
        if call is not None:
            call.fill(**{name: fixed.data_ptr() + 4 * at.start for name, at in self._at.items()}, pages=pages)
        kv_lens, page_starts = (fixed[self._at[name]][:bucket] for name in ("kv_lens", "page_starts"))
        self.requests = kv_lens, page_starts, pages  # [bucket], [bucket], [any]
        self._requests = np.arange(bucket, dtype=np.int32)
        self._usual = np.zeros(self.num_fixed, np.int32)
        self._usual[self._at["q_starts"]] = np.arange(bucket + 1)
        self._usual[self._at["q_lens"]][:-1] = 1
        self._usual[self._at["item_request"]] = bucket if cut else self._requests

    def send(self, staging: Staging, to: torch.Tensor, seq_lens: np.ndarray, table: np.ndarray, chunk: int) -> None:
        """A plan: seq_lens [R], table [R, W]."""
        num_reqs, total, at = len(seq_lens), self.num_fixed + table.size, self._at
        host = staging.take(total)
        host[: self.num_fixed] = self._usual
        lens = host[at["kv_lens"]]
        lens[:num_reqs] = seq_lens
        starts = host[at["page_starts"]]
        starts[:num_reqs] = self._requests[:num_reqs]
        starts[num_reqs:] = num_reqs
        starts *= table.shape[1]
        host[at["chunk_size"]] = chunk
        if self.cut:
            self._cut(host, lens[:-1], chunk)
        elif self.bucket > 64:  # more than fit at once: those that take longest go first
            host[at["item_request"]] = np.argsort(-lens[:-1], kind="stable")
        clamp_pages(table, host[self.num_fixed : total])
        staging.send(total, to[:total])

    def _cut(self, host: np.ndarray, lens: np.ndarray, chunk: int) -> None:
        num_chunks = np.maximum(-(-lens // chunk), 1)
        starts = host[self._at["merge_starts"]]
        np.cumsum(num_chunks, out=starts[1:])
        host[self._at["o_starts"]] = starts  # one row a request; the last is nobody's
        count = int(starts[-1])
        assert count <= self.num_items, "the schedule keeps to the grid"
        request = np.repeat(self._requests, num_chunks)
        host[self._at["item_request"]][:count] = request
        host[self._at["item_chunk"]][:count] = np.arange(count, dtype=np.int32) - starts[request]


def clamp_pages(table: np.ndarray, out: np.ndarray) -> None:
    """table [R, W] -> out [R * W]; -1 is no page to compute an address from, even of what is not read."""
    np.maximum(table, 0, out=out.reshape(table.shape), casting="unsafe")
