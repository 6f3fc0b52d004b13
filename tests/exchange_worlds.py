"""How to make each back end's exchange in a process of a test world; run in the child processes."""

import contextlib
import os
import signal
from dataclasses import replace
from multiprocessing.connection import Connection
from time import perf_counter

import torch
from exchange_conformance import LAYERS, LAYOUTS, TOP_K, check, make_epoch

from expertmesh.errors import ExchangeTimeout, PeerLost
from expertmesh.router.dispatch import plan
from expertmesh.router.epoch import Epoch, StepHeader
from expertmesh.router.exchange import Exchange, LocalExchange, RowShape
from expertmesh.router.exchange_gloo import GlooExchange
from expertmesh.router.group import build_gloo

HOST = "127.0.0.1"
_alive: list[Exchange] = []


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
            if rank == 2 and layer_id == 2:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                with contextlib.suppress(EOFError):
                    connection.recv()  # hangs until the parent is done with it
                return ("hung", 0, 0, 0, 0, 0.0)
            started = perf_counter()
            is_source = rank == 0
            source_plan = plan(ids, epoch.placement, layer_id) if is_source else None
            handle = exchange.dispatch(layer_id, source_plan, torch.ones(4, 16) if is_source else None)
            pairs = int((handle.slot_ids >= 0).sum())
            exchange.combine(torch.ones(pairs, 16), handle)
    except (PeerLost, ExchangeTimeout) as error:
        waited_s = perf_counter() - started
        return type(error).__name__, error.ep_rank, error.layer_id, error.step_id, error.epoch, waited_s
    return ("finished", 0, 0, 0, 0, 0.0)


def num_ranks(layout: str) -> int:
    return len(LAYOUTS[layout])
