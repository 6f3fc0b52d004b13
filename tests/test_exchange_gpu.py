"""The peer exchange on a GPU: all ranks of one process on one card, so that one GPU tests the kernels wholly; real
processes on two GPUs are in test_exchange_pair_gpu.py. Rows, graphs, deadlines, deaths, what is not finite."""

import time
from threading import Timer

import exchange_emulated
import pytest
import torch
from exchange_conformance import LAYOUTS, NUM_EXPERTS, TOP_K, check_device, factor, make_epoch, multiply_all
from test_exchange_device import reference_outputs, run_step

from expertmesh.errors import ExchangeTimeout, PeerLost
from expertmesh.kernels import reference
from expertmesh.kernels.combine import combine
from expertmesh.router.epoch import StepHeader
from expertmesh.router.exchange import RowShape
from expertmesh.router.guard import Direction
from expertmesh.router.placement import uniform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
GPU = torch.device("cuda", 0)
SHAPE = RowShape(hidden_size=1032, top_k=TOP_K, dtype=torch.bfloat16, device=GPU)  # 129 pieces: two units, one ragged


@pytest.fixture(autouse=True, scope="module")
def _loaded():
    """Modules are loaded before a kernel of another rank waits: loading may wait for the device."""
    x = torch.ones(4, TOP_K, SHAPE.hidden_size, dtype=torch.bfloat16, device=GPU)
    ids = torch.zeros(4, TOP_K, dtype=torch.int32, device=GPU)
    combine(x, ids, torch.ones(4, TOP_K, device=GPU))
    multiply_all(x[:, 0], ids, ids[0], 0).float().sum().item()
    reference.combine(x.cpu(), ids.cpu(), torch.ones(4, TOP_K))
    torch.randn(3, 5, device=GPU).argsort(1).to(torch.int32)


def conform(layout, *, bucket=0, redundant=0, shape=SHAPE, early_next=False):
    epoch = make_epoch(layout, redundant)
    exchanges = exchange_emulated.peers_of_one_gpu(epoch, shape, 256, early_next=early_next)
    return exchange_emulated.run_ranks(
        len(exchanges), lambda rank: check_device(rank, epoch, exchanges[rank], shape, bucket=bucket), GPU
    )


@pytest.mark.parametrize("bucket", [0, 48])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_come_back_from_the_right_expert(layout, bucket):
    assert sum(conform(layout, bucket=bucket)) > 500


@pytest.mark.parametrize("hidden", [24, 4096])
def test_other_sizes_of_rows_and_float32(hidden):
    shape = RowShape(hidden_size=hidden, top_k=TOP_K, dtype=torch.float32, device=GPU)
    assert sum(conform("2 colocated", shape=shape, redundant=7)) > 500


def test_a_step_over_several_ranks_equals_the_local_one():
    epoch = make_epoch("2 attention + 2 shards")
    for step_id, num_tokens in enumerate([(3, 0, 0, 0), (70, 9, 0, 0), (1, 1, 0, 0)], start=1):
        exchanges = exchange_emulated.peers_of_one_gpu(epoch, SHAPE, 64)
        header = StepHeader(step_id=step_id, epoch=1, placement_version=1, num_tokens=num_tokens)
        results = run_step(epoch, exchanges, header, SHAPE)
        for outputs in results:
            for out, wanted in reference_outputs(outputs, epoch, SHAPE) if outputs else ():
                assert (out.cpu() - wanted).abs().max() <= 2**-7 * wanted.abs().max()


class GraphWorld:
    """Two colocated ranks of one process, each with a captured step over all layers."""

    def __init__(self, num_tokens=5, bucket=8, timeout_s=20.0):
        self.epoch = make_epoch("2 colocated", redundant=6)
        self.exchanges = exchange_emulated.peers_of_one_gpu(self.epoch, SHAPE, 64, timeout_s=timeout_s)
        self.streams = [torch.cuda.Stream(GPU) for _ in self.exchanges]
        self.bucket, self.num_tokens, self.step_id = bucket, num_tokens, 0
        self.x = [torch.zeros(bucket, SHAPE.hidden_size, dtype=torch.bfloat16, device=GPU) for _ in range(2)]
        self.ids = [torch.full((bucket, TOP_K), -1, dtype=torch.int32, device=GPU) for _ in range(2)]
        self.logical = [torch.zeros(32, dtype=torch.int32, device=GPU) for _ in range(2 * 4)]
        self.out = [[], []]
        self.place(self.epoch.placement)
        self.graphs = [self.capture(rank) for rank in range(2)]

    def place(self, placement):
        for rank in range(2):
            with torch.cuda.stream(self.streams[rank]):
                self.exchanges[rank].use_placement(placement)
                for layer_id in placement.moe_layers:
                    held = placement.local_slots(layer_id, rank)
                    self.logical[4 * rank + layer_id][: len(held)].copy_(held)
        torch.cuda.synchronize()

    def capture(self, rank):
        graph = torch.cuda.CUDAGraph()
        exchange = self.exchanges[rank]
        with torch.cuda.graph(graph, stream=self.streams[rank], capture_error_mode="thread_local"):
            exchange._is_first = True
            for layer_id in self.epoch.placement.moe_layers:
                rows, slots = exchange.dispatch(layer_id, self.x[rank], self.ids[rank], self.bucket)
                y = exchange.combine(multiply_all(rows, slots, self.logical[4 * rank + layer_id], layer_id))
                self.out[rank].append(y.clone())
        return graph

    def step(self, ranks=(0, 1)):
        self.step_id += 1
        header = StepHeader(step_id=self.step_id, epoch=1, placement_version=1, num_tokens=(self.num_tokens,) * 2)
        for rank in ranks:
            with torch.cuda.stream(self.streams[rank]):
                self.exchanges[rank].begin(header, stride=self.bucket, attempt=0)
                self.graphs[rank].replay()
                self.exchanges[rank].end()

    def draw(self, seed):
        generator = torch.Generator(device=GPU).manual_seed(seed)
        for rank in range(2):
            with torch.cuda.stream(self.streams[rank]):
                self.x[rank].copy_(torch.randn(self.x[rank].shape, generator=generator, device=GPU))
                ids = torch.rand(self.bucket, NUM_EXPERTS, generator=generator, device=GPU).argsort(1)[:, :TOP_K]
                ids[self.num_tokens :] = -1
                self.ids[rank].copy_(ids)
        torch.cuda.synchronize()

    def check(self):
        for rank in range(2):
            assert self.exchanges[rank].verdict().bad == ()
            n = self.num_tokens
            for out, layer_id in zip(self.out[rank], self.epoch.placement.moe_layers, strict=True):
                wanted = self.x[rank][:n, None] * factor(self.ids[rank][:n], layer_id).to(torch.bfloat16)[:, :, None]
                assert out[:n].equal(wanted)


def test_a_thousand_steps_in_graphs_with_a_rebalance_that_touches_none():
    world = GraphWorld()
    for step in range(1000):
        if step == 500:
            table = uniform(4, NUM_EXPERTS, 2, 6, moe_layers=(0, 2, 3)).physical_to_logical.flip(1)
            world.place(type(world.epoch.placement)(2, NUM_EXPERTS, 2, table))
        if step % 50 == 0:
            world.draw(step)
        world.step()
        if step % 50 == 0:
            torch.cuda.synchronize()
            world.check()
        else:
            torch.cuda.synchronize()
            assert all(exchange.verdict().bad == () for exchange in world.exchanges)


def test_steps_may_queue_up_behind_each_other():
    world = GraphWorld()
    world.draw(1)
    for _ in range(4):
        world.step()
    torch.cuda.synchronize()
    for _ in range(4):
        world.check()


def test_a_missing_peer_ends_a_replayed_step_at_the_deadline_and_is_named():
    world = GraphWorld(timeout_s=0.3)
    world.draw(1)
    world.step()
    torch.cuda.synchronize()
    world.check()
    started = time.perf_counter()
    world.step(ranks=(0,))  # rank 1 never comes
    world.streams[0].synchronize()
    with pytest.raises(
        ExchangeTimeout, match=r"of rank 1 within 0.3 s \(ep_rank 1, layer 0, step 2, epoch 1\)"
    ) as caught:
        world.exchanges[0].verdict()
    assert 0.3 <= time.perf_counter() - started < 0.6
    assert caught.value.peer == 1
    world.step(ranks=(1,))  # late: it was given up, and learns it at once
    world.streams[1].synchronize()
    with pytest.raises(PeerLost):
        world.exchanges[1].verdict()


def test_a_death_that_is_known_ends_the_wait_at_once():
    world = GraphWorld(timeout_s=20.0)
    world.draw(1)
    world.step(ranks=(0,))
    Timer(0.1, lambda: world.exchanges[0].lose(1, "its process is gone")).start()
    started = time.perf_counter()
    world.streams[0].synchronize()
    assert time.perf_counter() - started < 1.0
    with pytest.raises(PeerLost, match="rank 1 is gone"):
        world.exchanges[0].verdict()
    header = StepHeader(step_id=9, epoch=1, placement_version=1, num_tokens=(1, 1))
    with pytest.raises(PeerLost):
        world.exchanges[0].begin(header, stride=8, attempt=0)
    assert torch.ones(8, device=GPU).sum().item() == 8  # the context lives


def test_rows_that_are_not_finite_are_named_by_layer_token_and_who_made_them():
    world = GraphWorld()
    world.draw(1)
    world.x[1][3, 1000] = float("inf")
    torch.cuda.synchronize()
    world.step()
    torch.cuda.synchronize()
    assert world.exchanges[0].verdict().bad == ()
    (bad,) = world.exchanges[1].verdict().bad
    assert (bad.direction, bad.source, bad.layer_id, bad.row) == (Direction.DISPATCH, 1, 0, 3)
    world.draw(2)
    victim = int(world.ids[0][2, 0])
    place = (world.logical[4 * 1 + 2] == victim).nonzero()
    world.logical[4 * 1 + 2][place] = -1  # rank 1 has nothing in that slot of layer 2: NaN
    world.logical[4 * 0 + 2][(world.logical[4 * 0 + 2] == victim).nonzero()] = -1
    torch.cuda.synchronize()
    world.step()
    torch.cuda.synchronize()
    found = [bad for exchange in world.exchanges for bad in exchange.verdict().bad]
    assert found
    assert {(bad.direction, bad.layer_id) for bad in found} == {(Direction.RETURN, 2)}
    for bad in found:
        assert victim in world.ids[bad.source][bad.row].tolist()
    world.draw(3)
    world.place(world.epoch.placement)
    world.step()
    torch.cuda.synchronize()
    world.check()


def test_a_source_that_was_not_named_writes_nothing_and_comes_back():
    epoch = make_epoch("2 attention + 2 shards")
    exchanges = exchange_emulated.peers_of_one_gpu(epoch, SHAPE, 64)
    for step_id, num_tokens in enumerate(
        [(3, 0, 0, 0), (0, 5, 0, 0), (2, 7, 0, 0), (0, 1, 0, 0), (4, 4, 0, 0)], start=1
    ):
        header = StepHeader(step_id=step_id, epoch=1, placement_version=1, num_tokens=num_tokens)
        results = run_step(epoch, exchanges, header, SHAPE)
        assert [bool(outputs) for outputs in results] == [n > 0 for n in num_tokens]
        for outputs in results:
            for out, wanted in reference_outputs(outputs, epoch, SHAPE) if outputs else ():
                assert (out.cpu() - wanted).abs().max() <= 2**-7 * wanted.abs().max()
