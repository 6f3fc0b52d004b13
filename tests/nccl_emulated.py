"""The NCCL exchange of several ranks in one process, a thread each, over a group that hands tensors around: every
layout on the CPU, and on one GPU with the kernels. What only real NCCL shows is in test_exchange_pair_gpu.py."""

import queue

import torch

from expertmesh.router.epoch import Epoch
from expertmesh.router.exchange import RowShape
from expertmesh.router.exchange_nccl import NcclExchange
from expertmesh.router.nccl_form import NcclForms


class World:
    """Who sent what to whom, in order, and how many bytes in all."""

    def __init__(self, num_ranks: int) -> None:
        ranks = range(num_ranks)
        self.between = {(source, to): queue.Queue() for source in ranks for to in ranks}
        self.num_bytes = 0


class HandedGroup:
    """One rank's end: the two forms of an all-to-all that the exchange uses."""

    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank = world, rank

    def alltoall(self, out, data, options):
        for to, part in enumerate(data):
            if part.numel():
                event = None
                if part.is_cuda:
                    event = torch.cuda.Event()
                    event.record()
                self.world.between[self.rank, to].put((part, event))
                self.world.num_bytes += part.nbytes
        for source, part in enumerate(out):
            if part.numel():
                came, event = self.world.between[source, self.rank].get(timeout=20)
                assert came.shape == part.shape
                if event is not None:
                    event.wait()
                    came.record_stream(torch.cuda.current_stream())
                part.copy_(came)
        return self

    def alltoall_base(self, out, data, receive, send, options):
        return self.alltoall(out.split(receive), data.split(send), options)

    def wait(self):
        pass

    def abort(self):
        pass


def make_exchanges(
    epoch: Epoch, shape: RowShape, *, capacity: int = 256, exact_above: int = 64, bounded: bool = False
) -> tuple[list[NcclExchange], World]:
    world = World(len(epoch.members))
    return [
        NcclExchange(
            HandedGroup(world, rank),
            epoch,
            rank,
            shape,
            capacity=capacity,
            exact_above=exact_above,
            timeout_base_s=20.0,
            timeout_per_row_s=0.0,
            forms=bounded_forms(epoch, shape, exact_above) if bounded else None,
        )
        for rank in range(len(epoch.members))
    ], world


def bounded_forms(epoch: Epoch, shape: RowShape, exact_above: int = 64) -> NcclForms:
    """The bounded form wherever there is more than one owner, with few places: random routing overflows some."""
    return NcclForms(
        num_owners=len(epoch.expert_ranks),
        top_k=shape.top_k,
        row_bytes=shape.hidden_size * shape.dtype.itemsize,
        exact_above=exact_above,
        worth_bytes=0,
        deviations=0.0,
    )
