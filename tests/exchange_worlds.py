"""How to make each back end's exchange in a process of a test world; run in the child processes."""

import contextlib
import os
import signal
import threading
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from time import perf_counter

import torch
from exchange_conformance import (
    LAYERS,
    LAYOUTS,
    NUM_EXPERTS,
    TOP_K,
    check,
    check_bounded,
    check_device,
    factor,
    make_epoch,
    multiply_all,
)
from nccl_emulated import bounded_forms
from torch.distributed import TCPStore

from expertmesh.errors import ExchangeError, ExchangeTimeout, PeerLost
from expertmesh.router.device_exchange import DeviceExchange
from expertmesh.router.dispatch import plan
from expertmesh.router.epoch import Epoch, StepHeader
from expertmesh.router.exchange import Exchange, LocalExchange, RowShape
from expertmesh.router.exchange_gloo import GlooExchange
from expertmesh.router.exchange_nccl import NcclExchange
from expertmesh.router.exchange_peer import PeerExchange, build_peer
from expertmesh.router.group import build_gloo, build_nccl

HOST = "127.0.0.1"
_alive: list[Exchange | DeviceExchange] = []


def make_exchange(backend: str, epoch: Epoch, rank: int, shape: RowShape, *, timeout_s: float = 30.0) -> Exchange:
    if backend == "local":
        return LocalExchange()
    group = build_gloo(epoch, rank, interface=HOST, timeout_s=30.0)
    return GlooExchange(group, epoch, rank, shape, timeout_base_s=timeout_s, timeout_per_row_s=0.0)


def conform(
    rank: int, _: Connection, backend: str, layout: str, dtype: torch.dtype, redundant: int, port: int, key: str
) -> int:
    epoch = make_epoch(layout, redundant, rendezvous_key=key, store_host=HOST, store_port=port)
    shape = RowShape(hidden_size=24, top_k=TOP_K, dtype=dtype)
    exchange = make_exchange(backend, epoch, rank, shape)
    pairs = check(rank, epoch, exchange, shape)
    _alive.append(exchange)  # until all are done
    return pairs


def make_device_exchange(
    backend: str, epoch: Epoch, rank: int, shape: RowShape, *, timeout_s: float = 20.0, exact_above: int = 64
) -> DeviceExchange:
    """`gloo` = the NCCL exchange's forms over gloo, on the CPU; `... bounded` = with few places for answers."""
    deadlines = {"timeout_base_s": timeout_s, "timeout_per_row_s": 0.0}
    if backend == "peer":
        return build_peer(epoch, rank, shape, capacity=256, epoch_timeout_s=30.0, **deadlines)
    forms = bounded_forms(epoch, shape, exact_above) if backend.endswith("bounded") else None
    if backend.startswith("nccl"):
        group = build_nccl(epoch, rank, shape.device, channels=16, timeout_s=30.0)
    else:
        group = build_gloo(epoch, rank, interface=HOST, timeout_s=30.0)
    return NcclExchange(group, epoch, rank, shape, capacity=256, exact_above=exact_above, forms=forms, **deadlines)


def device_of(rank: int, num_gpus: int) -> torch.device:
    """A process of a cluster sees its own GPU alone."""
    if not num_gpus:
        return torch.device("cpu")
    if "ALL_GPUS_VISIBLE" in os.environ:
        device = torch.device("cuda", rank % num_gpus)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"], device = str(rank % num_gpus), torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return device


def conform_device(
    rank: int, _: Connection, backend: str, layout: str, bucket: int, num_gpus: int, port: int, key: str
) -> int:
    epoch = make_epoch(layout, 5, rendezvous_key=key, store_host=HOST, store_port=port)
    shape = RowShape(hidden_size=136, top_k=TOP_K, dtype=torch.bfloat16, device=device_of(rank, num_gpus))
    exchange = make_device_exchange(backend, epoch, rank, shape)
    pairs = check_device(rank, epoch, exchange, shape, bucket=bucket)
    _alive.append(exchange)  # until all are done
    return pairs


def conform_bounded(
    rank: int, _: Connection, backend: str, layout: str, bucket: int, num_gpus: int, port: int, key: str
) -> tuple[int, int]:
    epoch = make_epoch(layout, 5, rendezvous_key=key, store_host=HOST, store_port=port)
    shape = RowShape(hidden_size=136, top_k=TOP_K, dtype=torch.bfloat16, device=device_of(rank, num_gpus))
    exchange = make_device_exchange(backend, epoch, rank, shape)
    counted = check_bounded(rank, epoch, exchange, shape, bucket=bucket)
    _alive.append(exchange)  # until all are done
    return counted


class GraphRank:
    """One rank of "2 colocated" in a process of its own, with a captured step over all layers."""

    def __init__(self, backend: str, epoch: Epoch, rank: int, device: torch.device, timeout_s: float = 20.0) -> None:
        self.shape = RowShape(hidden_size=1032, top_k=TOP_K, dtype=torch.bfloat16, device=device)
        self.exchange = make_device_exchange(backend, epoch, rank, self.shape, timeout_s=timeout_s)
        self.epoch, self.rank, self.step_id = epoch, rank, 0
        self.x = torch.zeros(8, 1032, dtype=torch.bfloat16, device=device)
        self.ids = torch.full((8, TOP_K), -1, dtype=torch.int32, device=device)
        self.logical = [epoch.placement.local_slots(layer, rank).to(device) for layer in range(4)]
        self.exchange.use_placement(epoch.placement)
        self.out: list[torch.Tensor] = []
        self.step(eager=True)  # every rank once, before anything is captured
        self.graph = torch.cuda.CUDAGraph()
        self.out.clear()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.turns()
        self.exchange.hold(self.graph)

    def turns(self) -> None:
        if isinstance(self.exchange, PeerExchange):
            self.exchange._is_first = True
        for layer_id in self.epoch.placement.moe_layers:
            rows, slots = self.exchange.dispatch(layer_id, self.x, self.ids, 8)
            y = self.exchange.combine(multiply_all(rows, slots, self.logical[layer_id], layer_id))
            assert y is not None
            self.out.append(y.clone())

    def header(self) -> StepHeader:
        self.step_id += 1
        return StepHeader(
            step_id=self.step_id, epoch=self.epoch.number, placement_version=1, num_tokens=(5, 5), bucket=8
        )

    def step(self, *, eager: bool = False) -> None:
        self.launch(eager=eager)
        event = torch.cuda.Event()
        event.record()
        self.exchange.wait(event)
        assert self.exchange.verdict().bad == ()

    def launch(self, *, eager: bool = False) -> None:
        self.exchange.begin(self.header(), stride=8, attempt=0)
        if eager:
            self.turns()
        else:
            self.graph.replay()
        self.exchange.end()

    def draw(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(10 * seed + self.rank)
        ids = torch.rand(8, NUM_EXPERTS, generator=generator).argsort(1)[:, :TOP_K].to(torch.int32)
        ids[5:] = -1
        self.x.copy_(torch.randn(8, 1032, generator=generator))
        self.ids.copy_(ids)

    def check(self) -> None:
        for out, layer_id in zip(self.out, self.epoch.placement.moe_layers, strict=True):
            wanted = self.x[:5, None] * factor(self.ids[:5], layer_id).to(torch.bfloat16)[:, :, None]
            assert out[:5].equal(wanted)


def meet_others(port: int, key: str) -> None:
    """Both ranks are here: from now on short deadlines hold."""
    store = TCPStore(HOST, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    if store.add(f"{key}/here", 1) == 2:
        store.set(f"{key}/all", "1")
    store.wait([f"{key}/all"])


def graph_steps(rank: int, _: Connection, backend: str, num_gpus: int, num_steps: int, port: int, key: str) -> int:
    epoch = make_epoch("2 colocated", 6, rendezvous_key=key, store_host=HOST, store_port=port)
    world = GraphRank(backend, epoch, rank, device_of(rank, num_gpus))
    for step in range(num_steps):
        world.draw(step)
        world.step()
        if step % 20 == 0:
            world.check()
    _alive.append(world.exchange)
    return world.step_id


def survive(
    rank: int, connection: Connection, backend: str, num_gpus: int, die_at: int, port: int, keys: tuple[str, str]
) -> tuple[str, float, float, float, int]:
    """Rank 1 is killed with its graph in flight; rank 0 notices, goes on alone on its GPU, and meets the replacement in
    the next epoch. `die_at` < 0: this is the replacement. Returns error, seconds to it, to the next exchange, in it."""
    device = device_of(rank, num_gpus)
    epoch = make_epoch("2 colocated", 6, rendezvous_key=keys[0], store_host=HOST, store_port=port)
    name, noticed_s, met_s, first_s = "", 0.0, 0.0, 0.0
    if die_at >= 0:
        world = GraphRank(backend, epoch, rank, device, timeout_s=0.5)
        world.draw(1)
        meet_others(port, keys[0])
        try:
            for step in range(die_at + 3):
                if rank == 1 and step == die_at:
                    world.launch()
                    os.kill(os.getpid(), signal.SIGKILL)
                started = perf_counter()
                world.step()
        except ExchangeError as error:
            name, noticed_s = f"{type(error).__name__}: {error}", perf_counter() - started
        assert torch.ones(1000, device=device).sum().item() == 1000  # the context lives
        world.exchange.abort()
        connection.send(("value", "noticed"))
        connection.recv()  # the replacement is started
    started = perf_counter()
    epoch = replace(epoch, number=2, rendezvous_key=keys[1])
    world = GraphRank(backend, epoch, rank, device)
    met_s, started = perf_counter() - started, perf_counter()
    for step in range(100):
        world.draw(step)
        world.step()
        world.check()
    first_s = perf_counter() - started
    _alive.append(world.exchange)
    return name, noticed_s, met_s, first_s, world.step_id


def grow_under_traffic(
    rank: int, _: Connection, backend: str, num_gpus: int, port: int, key: str
) -> tuple[float, float, float]:
    """The next membership's exchange is built in a thread while this one's graphs run. Returns the seconds that took,
    and the median and the longest step meanwhile."""
    device = device_of(rank, num_gpus)
    epoch = make_epoch("2 colocated", 6, rendezvous_key=key, store_host=HOST, store_port=port)
    world = GraphRank(backend, epoch, rank, device)
    world.draw(1)
    built: list[tuple[DeviceExchange, float]] = []

    def build() -> None:
        started = perf_counter()
        torch.cuda.set_device(device)
        following = replace(epoch, number=2, rendezvous_key=f"{key}-2")
        built.append((make_device_exchange(backend, following, rank, world.shape), perf_counter() - started))

    thread, times = threading.Thread(target=build), []
    for step in range(400):
        if step == 100:
            thread.start()
        started = perf_counter()
        world.step()
        times.append(perf_counter() - started)
    thread.join()
    world.check()
    exchange, took_s = built[0]
    world.exchange.retire()
    check_device(rank, epoch, exchange, world.shape)
    _alive.append(exchange)
    return took_s, sorted(times)[200], max(times[100:])


def lose_a_peer(
    rank: int, connection: Connection, how: str, port: int, key: str
) -> tuple[str, int, int, int, int, float]:
    """1 attention + 2 shards; in layer 2 of step 5 the last shard dies or hangs. What do the others see, and when?"""
    epoch = make_epoch("1 attention + 2 shards", rendezvous_key=key, store_host=HOST, store_port=port)
    epoch = replace(epoch, number=7)
    shape = RowShape(hidden_size=16, top_k=TOP_K, dtype=torch.float32)
    exchange = make_exchange("gloo", epoch, rank, shape, timeout_s=0.5)
    header = StepHeader(step_id=5, epoch=7, placement_version=1, num_tokens=(4, 0, 0))
    ids = torch.tensor([[0, 4, 8, 11]] * 4, dtype=torch.int32)
    started = perf_counter()
    try:
        exchange.begin(header, LAYERS)
        for layer_id in LAYERS:
            started = perf_counter()
            is_source = rank == 0
            source_plan = plan(ids, epoch.placement, layer_id) if is_source else None
            handle = exchange.dispatch(layer_id, source_plan, torch.ones(4, 16) if is_source else None)
            if rank == 2 and layer_id == 2:  # its rows are here, so the source has the answers of the layer before
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                with contextlib.suppress(EOFError):
                    connection.recv()  # hangs until the parent is done with it
                return ("hung", 0, 0, 0, 0, 0.0)
            pairs = int((handle.slot_ids >= 0).sum())
            exchange.combine(torch.ones(pairs, 16), handle)
    except (PeerLost, ExchangeTimeout) as error:
        waited_s = perf_counter() - started
        return type(error).__name__, error.ep_rank, error.layer_id, error.step_id, error.epoch, waited_s
    return ("finished", 0, 0, 0, 0, 0.0)


def num_ranks(layout: str) -> int:
    return len(LAYOUTS[layout])
