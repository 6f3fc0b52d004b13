"""Several ranks of a device exchange in one process, a thread each.

On a GPU: the `peer` exchange itself, every rank with a buffer and a stream of its own, which tests the kernels wholly
on one GPU. Without one: `EmulatedExchange`, the same index math in torch with a lock for a wire."""

import threading
from collections.abc import Callable
from typing import Any

import torch

from expertmesh.errors import PeerLost
from expertmesh.kernels.nccl_pack_reference import owners_and_slots
from expertmesh.kernels.peer_exchange import TABLE_WIDTH
from expertmesh.kernels.peer_memory import PeerMemory
from expertmesh.router.device_exchange import DeviceExchange, Verdict, copies_table
from expertmesh.router.epoch import Epoch, StepHeader
from expertmesh.router.exchange import RowShape
from expertmesh.router.exchange_peer import PeerExchange, peer_layouts
from expertmesh.router.placement import Placement


class Wire:
    """What all ranks see: parcels by name."""

    def __init__(self, timeout_s: float = 20.0) -> None:
        self._parcels: dict[Any, Any] = {}
        self._changed = threading.Condition()
        self._timeout_s = timeout_s
        self.broken = False

    def put(self, name: Any, parcel: Any) -> None:
        with self._changed:
            self._parcels[name] = parcel
            self._changed.notify_all()

    def take(self, name: Any) -> Any:
        with self._changed:
            if not self._changed.wait_for(lambda: self.broken or name in self._parcels, self._timeout_s) or self.broken:
                raise PeerLost(f"{name} did not come", ep_rank=-1, layer_id=-1, step_id=0, epoch=0)
            return self._parcels.pop(name)

    def cut(self) -> None:
        with self._changed:
            self.broken = True
            self._changed.notify_all()


class EmulatedExchange(DeviceExchange):
    """Blocks in `dispatch` and `combine`, as nothing on a device does; else what every back end is."""

    def __init__(self, epoch: Epoch, rank: int, shape: RowShape, wire: Wire, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._epoch, self._rank, self._shape, self._wire = epoch, rank, shape, wire
        self._owner = epoch.expert_ranks.index(rank) if rank in epoch.expert_ranks else -1
        self._turn = 0

    def use_placement(self, placement: Placement) -> None:
        self._table = copies_table(placement, TABLE_WIDTH)

    def begin(self, header: StepHeader, *, stride: int, attempt: int) -> None:
        self._header, self._attempt, self._turn = header, attempt, 0

    def dispatch(
        self, layer_id: int, x: torch.Tensor | None, topk_ids: torch.Tensor | None, stride: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._turn, self._stride = self._turn + 1, stride
        name = self._header.step_id, self._turn
        self._num_tokens = None if x is None else x.shape[0]
        if x is not None:
            owner, slot = owners_and_slots(topk_ids, self._table[layer_id], self._rank + self._attempt)
            self._owners = owner
            for ep_rank in range(len(self._epoch.expert_ranks)):
                needed = (owner == ep_rank).any(1)
                rows = torch.full((stride, self._shape.hidden_size), float("nan"), dtype=x.dtype)
                rows[: x.shape[0]][needed] = x[needed]
                slots = torch.full((stride, self._shape.top_k), -1, dtype=torch.int32)
                slots[: x.shape[0]] = torch.where(owner == ep_rank, slot, -1)
                self._wire.put((*name, "rows", self._rank, ep_rank), (rows, slots))
        if self._owner < 0:
            return torch.empty(0, self._shape.hidden_size, dtype=self._shape.dtype), torch.empty(0, self._shape.top_k)
        nothing = (
            torch.full((stride, self._shape.hidden_size), float("nan"), dtype=self._shape.dtype),
            torch.full((stride, self._shape.top_k), -1, dtype=torch.int32),
        )
        came = [
            self._wire.take((*name, "rows", s, self._owner)) if self._header.num_tokens[s] else nothing
            for s in self._epoch.attention_ranks
        ]
        return torch.cat([rows for rows, _ in came]), torch.cat([slots for _, slots in came])

    def combine(self, expert_rows: torch.Tensor) -> torch.Tensor | None:
        name = self._header.step_id, self._turn
        if self._owner >= 0:
            for part, source in zip(expert_rows.split(self._stride), self._epoch.attention_ranks, strict=True):
                if self._header.num_tokens[source]:
                    self._wire.put((*name, "answers", self._owner, source), part)
        if self._num_tokens is None:
            return None
        answers = [self._wire.take((*name, "answers", p, self._rank)) for p in range(len(self._epoch.expert_ranks))]
        out = torch.full((self._num_tokens, self._shape.top_k, self._shape.hidden_size), float("nan"))
        out = out.to(self._shape.dtype)
        for ep_rank, answer in enumerate(answers):
            here = self._owners == ep_rank
            out[here] = answer[: self._num_tokens][here]
        return out

    def end(self) -> None:
        pass

    def verdict(self) -> Verdict:
        return Verdict()

    def hold(self, graph: torch.cuda.CUDAGraph) -> None:
        pass

    def abort(self) -> None:
        self._wire.cut()


def emulate(epoch: Epoch, shape: RowShape, capacity: int) -> list[DeviceExchange]:
    """An exchange for every rank of the epoch, on the CPU."""
    wire = Wire()
    return [EmulatedExchange(epoch, rank, shape, wire, capacity) for rank in range(len(epoch.members))]


def peers_of_one_gpu(
    epoch: Epoch, shape: RowShape, capacity: int, *, timeout_s: float = 20.0, early_next: bool = False
) -> list[PeerExchange]:
    """The real thing for every rank of the epoch: buffers of one process on one GPU."""
    memories = [PeerMemory(layout, shape.device) for layout in peer_layouts(epoch, shape, capacity)]
    return [
        PeerExchange(
            epoch,
            rank,
            shape,
            memory,
            [m.base for m in memories],
            timeout_base_s=timeout_s,
            timeout_per_row_s=0.0,
            early_next=early_next,
        )
        for rank, memory in enumerate(memories)
    ]


def run_ranks(num_ranks: int, work: Callable[[int], Any], device: torch.device) -> list[Any]:
    """`work(rank)` in a thread a rank, each with a stream of its own; the first error is raised when all have ended."""
    results: list[Any] = [None] * num_ranks
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            if device.type != "cuda":
                results[rank] = work(rank)
                return
            torch.cuda.set_device(device)
            with torch.cuda.stream(torch.cuda.Stream(device)):
                results[rank] = work(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
