"""How a step gets to a GPU and its ids back: pinned memory in turns, and the fixed inputs that captured steps read.

Several steps are under way at once, so each has memory of its own until it is over. All of it is there from the start,
as much as the largest step needs: while the driver makes more the GPU runs dry behind it, 20 ms for two pieces."""

from dataclasses import dataclass

import numpy as np
import torch

from .batch import StepBatch
from .device_model import DeviceBatch


class Inputs:
    """Fixed addresses that captured steps read: one buffer, sent by one copy."""

    def __init__(self, most: int, device: torch.device) -> None:
        self.most = most
        self.buffer = torch.zeros(self.size, dtype=torch.int64, device=device)
        self.token_ids, self.positions, self.slot_mapping = self.buffer[: 3 * most].split(most)
        tail = self.buffer[3 * most :].view(torch.int32)
        self.slots, self.num_valid = tail[:most], tail[most : most + 1]

    @property
    def size(self) -> int:
        return 3 * self.most + (self.most + 2) // 2

    def batch(self, bucket: int) -> DeviceBatch:
        return DeviceBatch(
            token_ids=self.token_ids[:bucket],
            positions=self.positions[:bucket],
            slot_mapping=self.slot_mapping[:bucket],
            num_valid=self.num_valid,
        )


@dataclass(slots=True)
class Fetched:
    """Ids and flags on their way to the host."""

    began: torch.cuda.Event | None  # where the device began with the step
    arrived: torch.cuda.Event
    ids: np.ndarray  # [S] int64, pinned
    flags: np.ndarray  # [S] uint8, pinned


class Stage:
    """Pinned memory of one step, in and out; free again when the step is over."""

    def __init__(self, num_bytes: int, num_rows: int) -> None:
        self._sent = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self._ids = torch.empty(num_rows, dtype=torch.int64, pin_memory=True)
        self._flags = torch.empty(num_rows, dtype=torch.uint8, pin_memory=True)
        self._used = 0  # bytes of `_sent`
        self._began, self._last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._is_timed = False

    def wait_until_free(self) -> None:
        self._last.synchronize()
        self._used, self._is_timed = 0, False

    def begin(self) -> None:
        """What the device does from here on is the step."""
        self._began.record()
        self._is_timed = True

    def send(self, array: np.ndarray, device: torch.device) -> torch.Tensor:
        """A copy on the device, on its way."""
        pinned = self._room(array.nbytes)
        pinned.numpy()[:] = array.view(np.uint8)
        return pinned.to(device, non_blocking=True).view(torch.from_numpy(array).dtype)

    def fill(self, inputs: Inputs, batch: StepBatch, token_ids: np.ndarray, slots: np.ndarray) -> None:
        """Send a step to the fixed inputs; what is not filled is padding."""
        count, most = len(token_ids), inputs.most
        pinned = self._room(inputs.size * 8)
        words = pinned.numpy().view(np.int64)
        words[:count] = token_ids
        words[most : most + count] = batch.positions.numpy()
        words[2 * most : 2 * most + count] = batch.slot_mapping.numpy()
        words[count:most] = 0
        words[most + count : 2 * most] = 0
        words[2 * most + count : 3 * most] = -1
        tail = words[3 * most :].view(np.int32)
        tail[: len(slots)] = slots
        tail[len(slots) : most] = -1
        tail[most] = count
        inputs.buffer.copy_(pinned.view(torch.int64), non_blocking=True)

    def fetch(self, ids: torch.Tensor, flags: torch.Tensor, count: int) -> Fetched:
        """The first `count` of both, on their way to the host; the last thing that the step does."""
        if count:
            self._ids[:count].copy_(ids[:count], non_blocking=True)
            self._flags[:count].copy_(flags[:count], non_blocking=True)
        self._last.record()
        began = self._began if self._is_timed else None
        return Fetched(began, self._last, self._ids[:count].numpy(), self._flags[:count].numpy())

    def _room(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8, pinned, not used in this step yet."""
        start = -(-self._used // 16) * 16
        if start + num_bytes > len(self._sent):
            # What was sent of the old memory in this step is held by its copy, through torch's pinned allocator.
            start, size = 0, 1 << (2 * num_bytes - 1).bit_length()
            self._sent = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self._used = start + num_bytes
        return self._sent[start : start + num_bytes]
