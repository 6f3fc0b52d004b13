"""Do bits that fall over stay silent? `make bit-flips`: in exchanged rows, and in expert weights at rest.

**Rows.** A real engine and two expert shards as processes over Gloo, each expert on both; a wire (`flipping_wire.py`)
turns one random bit over in about one message of a hundred: rows in both directions in every layer, and what describes
them (counts, slot ids, checksums, verdicts). Each flip must be named by the source: step, shard, layer. Greedy and
sampled streams with shared prefixes and a small KV pool, so that what a void step left in KV or in the prefix cache
would be read again; each must equal its solo run in an undisturbed process.

**Weights.** A whole engine in one process under traffic, its scrubber running; bits fall over in resident experts, ten
at a time. Each must be named (layer, expert, slot) and repaired within a round of the scrub, the memory must be what it
was, and streams after the last repair must be those of an undisturbed process. Streams that ran meanwhile may differ:
the faults say how many of their rows are suspect.

Exits 1 where a flip is silent or a token differs. The last line is JSON."""

import argparse
import contextlib
import itertools
import json
import logging
import multiprocessing
import queue
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..cluster.attention.engine import StepStats
from ..config import CacheConfig, SchedulerConfig
from ..errors import ExpertMeshError, GuardError
from ..experts.mlp import LocalExpertMLP
from ..experts.scrub import Scrubber
from ..make_checkpoint import PRESETS, make_checkpoint
from ..request import EngineRequest
from ..router.epoch import Epoch, StepHeader
from ..router.exchange import RowShape
from ..router.guard import BadRow, Direction, Fault
from ..router.mesh import ClusterMesh, MeshOptions
from ..router.placement import uniform
from .flipping_wire import Flip, FlippingMesh
from .local_engine import LocalEngine
from .preemption import blocks_of, mixed_requests

NUM_SHARDS = 2
_TIMEOUT_S = 300.0
Seen = tuple[int, BadRow]  # step id, what was named


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -P -m expertmesh.bench.bit_flips", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1000, help="bits to turn over in exchanged messages (default 1000)")
    parser.add_argument("--rate", type=float, default=0.06, help="part of the messages that are hit (default 0.06)")
    parser.add_argument("--weights", type=int, default=200, help="bits to turn over in expert weights (default 200)")
    parser.add_argument("--period", type=float, default=1.0, help="seconds of a round of the scrub (default 1)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="expertmesh-flips-") as folder:
        make_checkpoint(folder, {**PRESETS["tiny-moe"], "vocab_size": 4096}, seed=3, dtype="float32")
        weights = flip_weights(folder, arguments.weights, period_s=arguments.period)
        print(f"weights: {weights}", file=sys.stderr)
        rows = flip_rows(folder, arguments.rows, rate=arguments.rate)
    ok = rows["ok"] and weights["ok"]
    print(json.dumps({"ok": ok, "rows": rows, "weights": weights}))
    return 0 if ok else 1


def flip_weights(folder: str | Path, wanted: int, *, period_s: float, at_once: int = 10) -> dict[str, Any]:
    """`wanted` bits in resident experts of an engine that serves all the while."""
    started, generator = time.monotonic(), random.Random(0)
    logging.disable(logging.ERROR)  # hundreds of faults are named here
    engine = LocalEngine(folder, cache=CacheConfig(num_blocks=512, enable_prefix_cache=False))
    experts = engine.mesh.experts
    assert isinstance(experts, LocalExpertMLP)
    cells = [(layer_id, slot) for layer_id, held in experts.resident_layers() for slot in range(len(held.logical_ids))]
    layers = dict(experts.resident_layers())
    before = {layer_id: (held.w13.clone(), held.w2.clone()) for layer_id, held in layers.items()}
    scrubber = Scrubber(experts, count_rows=engine.mesh.load, period_s=period_s, max_share=0.5)
    engine.mesh.guard.heal = scrubber.check_layer
    num_wrong, longest_s, most_rounds = 0, 0.0, 0
    with engine:
        requests = mixed_requests(8, engine.engine.vocab_size, longest=48)
        truth = [engine.run([request])[0].token_ids for request in requests]
        stop = threading.Event()
        traffic = threading.Thread(target=_traffic, args=(engine, requests, stop))
        traffic.start()
        scrubber.start()
        for _ in range(0, wanted, at_once):
            chosen = {cell: generator.choice(("w13", "w2")) for cell in generator.sample(cells, at_once)}
            rounds, known, hit_at = scrubber.num_rounds, scrubber.num_faults, time.monotonic()
            for (layer_id, slot), part in chosen.items():
                _flip_bit(getattr(layers[layer_id], part)[slot], generator)
            while scrubber.num_faults < known + len(chosen) and scrubber.num_rounds < rounds + 10:
                time.sleep(0.002)
            longest_s = max(longest_s, time.monotonic() - hit_at)
            most_rounds = max(most_rounds, scrubber.num_rounds - rounds)
            named = {(fault.layer_id, fault.slot): fault for fault in scrubber.faults if fault.repaired_from}
            num_wrong += sum(
                cell not in named or layers[cell[0]].logical_ids[cell[1]] != named[cell].expert for cell in chosen
            )
            scrubber.faults.clear()
        scrubber.stop()
        stop.set()
        traffic.join()
        again = [replace(request, request_id=f"after-{request.request_id}") for request in requests]
        num_different = sum(s.token_ids != t for s, t in zip(engine.run(again), truth, strict=True))
    restored = all(h.w13.equal(before[i][0]) and h.w2.equal(before[i][1]) for i, h in layers.items())
    found = scrubber.num_faults
    return {
        "flips": found,
        "not_named_and_repaired": num_wrong,
        "period_s": period_s,
        "longest_s": round(longest_s, 2),
        "last_round_s": round(scrubber.round_s, 2),
        "most_rounds_begun": most_rounds,
        "memory_restored": restored,
        "streams_after_that_differ": num_different,
        "seconds": round(time.monotonic() - started, 1),
        "ok": found >= wanted and not num_wrong and most_rounds <= 1 and restored and not num_different,
    }


def _traffic(engine: LocalEngine, requests: Sequence[EngineRequest], stop: threading.Event) -> None:
    for number in itertools.count():
        if stop.is_set():
            return
        engine.run([replace(request, request_id=f"t{number}-{request.request_id}") for request in requests])


def _flip_bit(tensor: torch.Tensor, generator: random.Random) -> None:
    data = tensor.view(-1).view(torch.uint8).numpy()
    bit = generator.randrange(8 * data.size)
    data[bit // 8] ^= 1 << bit % 8


def flip_rows(folder: str | Path, wanted: int, *, rate: float, count: int = 16, longest: int = 48) -> dict[str, Any]:
    """Rounds of `count` requests until `wanted` bits have fallen."""
    started = time.monotonic()
    with LocalEngine(folder, cache=CacheConfig(num_blocks=64, enable_prefix_cache=False)) as solo:
        requests = mixed_requests(count, solo.engine.vocab_size, longest=longest)
        alone = [solo.run([request])[0].token_ids for request in requests]
    flips: list[Flip] = []
    seen: list[Seen] = []
    num_different = num_rounds = num_replays = 0
    with World(folder, requests, rate) as world:
        while len(flips) < wanted and (num_rounds < 4 or flips):
            streams, more, num_replays = world.ask(0, num_rounds)
            num_different += sum(tokens != truth for tokens, truth in zip(streams, alone, strict=True))
            seen += more
            flips = [flip for rank in range(1 + NUM_SHARDS) for flip in world.ask(rank, "flips")]
            num_rounds += 1
            print(f"round {num_rounds}: {len(flips)} bits turned over, {num_replays} replays", file=sys.stderr)
    layers = Checkpoint(folder).config.moe_layer_ids
    silent = [flip for flip in flips if not is_named(flip, seen, layers)]
    for flip in silent[:8]:
        print(f"silent: {flip}", file=sys.stderr)
    unnamed = [row for _, row in seen if row.row >= 0 and not (row.shard and row.experts)]
    return {
        "flips": len(flips),
        "in_rows": sum(flip.in_rows for flip in flips),
        "returning": sum(flip.is_return for flip in flips),
        "silent": len(silent),
        "rows_without_shard_or_expert": len(unnamed),
        "replays": num_replays,
        "streams": num_rounds * count,
        "streams_that_differ": num_different,
        "seconds": round(time.monotonic() - started, 1),
        "ok": len(flips) >= wanted and not silent and not unnamed and not num_different,
    }


def is_named(flip: Flip, seen: Sequence[Seen], layers: Sequence[int], first_shard: int = 1) -> bool:
    """By its step, shard and layer. Where the same shard's verdict was hit too, that one stands for the step."""
    ep_rank = max(flip.sender, flip.receiver) - first_shard
    direction = Direction.RETURN if flip.is_return else Direction.DISPATCH
    layer_id = layers[flip.turn] if flip.turn < len(layers) else -1
    for step_id, row in seen:
        if step_id == flip.step_id and row.ep_rank == ep_rank:
            is_verdict = row.fault is Fault.HEAD and row.direction is Direction.RETURN
            if is_verdict or (row.layer_id == layer_id and row.direction is direction):
                return True
            # An answer to a message whose head was damaged means nothing, whatever its bits.
            if flip.is_return and row.layer_id == layer_id and row.fault is Fault.HEAD:
                return True
    return False


class World:
    """Rank 0 the engine, the others shards; each a process."""

    def __init__(self, folder: str | Path, requests: Sequence[EngineRequest], rate: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(1 + NUM_SHARDS):
            ours, theirs = context.Pipe()
            target, share = (_attention, list(requests)) if rank == 0 else (_shard, [])
            process = context.Process(target=target, args=(theirs, rank, str(folder), share, rate), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        members = tuple(self._receive(rank) for rank in range(1 + NUM_SHARDS))
        config = Checkpoint(folder).config
        placement = uniform(
            config.num_layers, config.num_experts, NUM_SHARDS, config.num_experts, moe_layers=config.moe_layer_ids
        )
        epoch = Epoch(
            number=1,
            members=members,
            placement=placement,
            rendezvous_key="flips",
            store_host=members[0].host,
            store_port=members[0].store_port,
        )
        for order in (epoch, "commit"):
            for pipe in self._pipes:
                pipe.send(order)
            for rank in range(1 + NUM_SHARDS):
                self._receive(rank)

    def ask(self, rank: int, order: Any) -> Any:
        self._pipes[rank].send(order)
        return self._receive(rank)

    def _receive(self, rank: int) -> Any:
        if not self._pipes[rank].poll(_TIMEOUT_S):
            raise TimeoutError(f"rank {rank} sent nothing for {_TIMEOUT_S} s")
        return self._pipes[rank].recv()

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send("end")
        for process in self._processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()


class MeshEngine(LocalEngine):
    """An engine whose experts are elsewhere; remembers what its steps found bad."""

    def __init__(self, folder: str, mesh: ClusterMesh, requests: Sequence[EngineRequest]) -> None:
        self.seen: list[Seen] = []
        cache = CacheConfig(num_blocks=blocks_of(requests, 16) // 2)
        scheduler = SchedulerConfig(max_num_batched_tokens=160, max_prefill_tokens_per_step=100)
        super().__init__(folder, cache=cache, scheduler=scheduler, observer=self, mesh=mesh)

    def observe(self, stats: StepStats) -> None:
        if isinstance(stats.error, GuardError):
            self.seen += [(stats.header.step_id, row) for row in stats.error.bad]


def _attention(pipe: Connection, rank: int, folder: str, requests: list[EngineRequest], rate: float) -> None:
    mesh = _mesh(rank, folder, rate, attention=True)
    with MeshEngine(folder, mesh, requests) as engine:
        _join(pipe, mesh)
        while (order := pipe.recv()) != "end":
            if order == "flips":
                pipe.send(_take(mesh.wire.flips))
                continue
            again = [replace(request, request_id=f"{order}-{request.request_id}") for request in requests]
            streams = [stream.token_ids for stream in engine.run(again, _TIMEOUT_S)]
            pipe.send((streams, _take(engine.seen), mesh.guard.num_replays))


def _shard(pipe: Connection, rank: int, folder: str, _: list[EngineRequest], rate: float) -> None:
    mesh = _mesh(rank, folder, rate, attention=False)
    headers: queue.SimpleQueue[StepHeader] = queue.SimpleQueue()
    mesh.start(headers.put)
    _join(pipe, mesh)
    threading.Thread(target=_serve, args=(mesh, headers), daemon=True).start()
    while pipe.recv() != "end":
        pipe.send(_take(mesh.wire.flips))
    mesh.close()


def _serve(mesh: ClusterMesh, headers: "queue.SimpleQueue[StepHeader]") -> None:
    with contextlib.suppress(ExpertMeshError):  # the source has left
        while True:
            mesh.enter(headers.get()).serve()


def _mesh(rank: int, folder: str, rate: float, *, attention: bool) -> FlippingMesh:
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)  # thousands of rows are named here
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    mesh = FlippingMesh(
        f"member{rank}#0",
        attention=attention,
        experts=None if attention else LocalExpertMLP(checkpoint),
        shape=RowShape(hidden_size=config.hidden_size, top_k=config.top_k, dtype=torch.float32),
        options=MeshOptions(cluster_token="flips"),
    )
    mesh.rate, mesh.generator = rate, random.Random(rank)
    return mesh


def _join(pipe: Connection, mesh: FlippingMesh) -> None:
    pipe.send(mesh.member)
    mesh.prepare(pipe.recv())
    pipe.send(None)
    pipe.recv()
    mesh.commit(1)
    pipe.send(None)


def _take(found: list[Any]) -> list[Any]:
    """A copy; the list is appended to by another thread."""
    return list(found)


if __name__ == "__main__":
    sys.exit(main())
