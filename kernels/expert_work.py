"""What a rank's experts did: rows of each expert and the time that they took, noted by the kernels that do the work.

Why on the device: a step is a CUDA graph or runs ahead of the host, and the host must not wait to know how busy a shard
is. No kernel is added for it (`expert_work.cuh`): the routing notes when a product begins and adds its rows up, every
CTA of the product when it ends. So what a rank waits for, in the exchange or between steps, is not in it. The host
reads once a report, not a step, on a stream of its own, since the engine's may wait for peers."""

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

MAX_EXPERTS = 512  # of a rank and layer, as permute.cu


@dataclass(frozen=True, slots=True, eq=False)
class LayerWork:
    """What the kernels of one layer's product write to; its addresses never change."""

    clock: torch.Tensor  # [4] int64, `struct Work`: busy ns, beginning and end of the last product
    rows: torch.Tensor  # [MAX_EXPERTS] int64, added to


class ExpertWork:
    """`count_for` in the engine's thread; `rows` and `busy_s` from any."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self._clock = torch.zeros(4, dtype=torch.int64, device=device)
        self._rows = torch.zeros(num_layers, MAX_EXPERTS, dtype=torch.int64, device=device)
        self._layers = [LayerWork(self._clock, rows) for rows in self._rows]
        self._lock = threading.Lock()
        self._version = 0  # of the placement whose rows are counted
        on_gpu = device.type == "cuda"
        self._reading = torch.cuda.Stream(device) if on_gpu else None
        self._cleared = torch.cuda.Event() if on_gpu else None
        if on_gpu:
            torch.cuda.current_stream(device).synchronize()  # others may read at once

    def of(self, layer_id: int) -> LayerWork:
        return self._layers[layer_id]

    def count_for(self, version: int) -> None:
        """Count rows of this placement version from here on, anew where it is another one. Enqueued on the current
        stream."""
        with self._lock:
            if version == self._version:
                return
            self._version = version
            self._rows.zero_()
            if self._cleared is not None:
                self._cleared.record()

    def rows(self, version: int) -> npt.NDArray[np.int64]:
        """[num_layers, MAX_EXPERTS] under this placement version; zeros where the device has not come there yet, or has
        left it."""
        with self._lock:
            if version != self._version or (self._cleared is not None and not self._cleared.query()):
                return np.zeros(self._rows.shape, dtype=np.int64)
            return self._read(self._rows)

    def busy_s(self) -> float:
        """Seconds in which rows were computed, since the start, without the last product."""
        with self._lock:
            return float(self._read(self._clock[:1])[0]) * 1e-9

    def _read(self, tensor: torch.Tensor) -> npt.NDArray[np.int64]:
        if self._reading is None:
            return tensor.numpy().copy()
        with torch.cuda.stream(self._reading):
            return tensor.cpu().numpy()


def note_in_torch(work: LayerWork, local_ids: torch.Tensor, took_ns: int) -> None:
    """What the kernels note, for a product in plain torch: `local_ids` of its pairs, -1 none."""
    counts = torch.bincount(local_ids.flatten().long() + 1, minlength=1)[1:]
    work.rows[: counts.numel()] += counts
    work.clock[0] += took_ns if counts.numel() else 0
