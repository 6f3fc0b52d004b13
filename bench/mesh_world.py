"""The model over a real mesh: attention replicas and expert shards as processes, rows over gloo, steps by header.

For parity: what the streams of all replicas compute together must be, bit for bit, what each computes alone in one
process. No Ray, gateway or scheduler: each replica runs its streams in random chunks and mixes, then greedily."""

import hashlib
import multiprocessing
import queue
import random
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..experts.mlp import LocalExpertMLP
from ..router.contracts import StepContext
from ..router.epoch import Epoch, StepHeader
from ..router.exchange import RowShape
from ..router.mesh import ClusterMesh, MeshOptions
from ..router.placement import Placement
from .in_process import InProcessModel, Stream

_TIMEOUT_S = 120.0


class MeshModel(InProcessModel):
    """An attention replica whose experts are elsewhere: a step is bid for, named by a header and entered."""

    def __init__(self, folder: str | Path, mesh: ClusterMesh, headers: "queue.SimpleQueue[StepHeader]") -> None:
        super().__init__(folder, experts_elsewhere=True)
        self.mesh, self.headers = mesh, headers

    def step(self, num_tokens: int = 0) -> StepContext:
        self.mesh.bid(num_tokens, 0)
        return self.mesh.enter(self.headers.get(timeout=_TIMEOUT_S))


def digests_over_mesh(
    folder: str | Path, prompts: Sequence[Sequence[int]], num_new: int, *, num_replicas: int, placement: Placement
) -> list[str]:
    """Digest of every prompt's logits and greedy continuation, prompts dealt to `num_replicas` attention processes, the
    experts in `placement.ep_size` processes of their own."""
    context = multiprocessing.get_context("spawn")
    roles = ["attention"] * num_replicas + ["expert"] * placement.ep_size
    shares = [list(range(i, len(prompts), num_replicas)) for i in range(num_replicas)]
    pipes, processes = [], []
    for rank, role in enumerate(roles):
        ours, theirs = context.Pipe()
        mine = [list(prompts[i]) for i in shares[rank]] if role == "attention" else []
        process = context.Process(target=_member, args=(theirs, rank, role, str(folder), mine, num_new), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    try:
        members = tuple(_receive(pipe) for pipe in pipes)
        leader = members[0]
        epoch = Epoch(
            number=1,
            members=members,
            placement=placement,
            rendezvous_key="parity",
            store_host=leader.host,
            store_port=leader.store_port,
        )
        for pipe in pipes:
            pipe.send(epoch)
        for pipe in pipes:
            _receive(pipe)  # prepared
        for pipe in pipes:
            pipe.send("go")
        digests = [""] * len(prompts)
        for share, pipe in zip(shares, pipes):
            for i, digest in zip(share, _receive(pipe)):
                digests[i] = digest
        for pipe in pipes:
            pipe.send("end")
        for process in processes:
            process.join(timeout=20)
        return digests
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()


def digests_alone(model: InProcessModel, prompts: Sequence[Sequence[int]], num_new: int) -> list[str]:
    """The truth: each prompt by itself, prefilled whole."""
    return [_run_streams(model, [prompt], num_new, None)[0] for prompt in prompts]


def _run_streams(
    model: InProcessModel, prompts: Sequence[Sequence[int]], num_new: int, generator: random.Random | None
) -> list[str]:
    """All streams to their ends; `generator` None = whole prompts in the given order, else random chunks and order."""
    streams = [model.open(prompt, num_tokens=len(prompt) + num_new) for prompt in prompts]
    hashes = [hashlib.sha256() for _ in prompts]
    ends = [len(prompt) + num_new for prompt in prompts]
    while work := [(i, s) for i, s in enumerate(streams) if len(s.tokens) < ends[i]]:
        if generator is not None:
            generator.shuffle(work)
        step = [(s, _count(s, generator)) for _, s in work]
        for (i, stream), logits in zip(work, model.run(step, all_rows=True)):
            hashes[i].update(logits.numpy().tobytes())
            if stream.num_computed == len(stream.tokens):
                stream.tokens.append(int(logits[-1].argmax()))
    for stream in streams:
        model.close(stream)
    return [h.hexdigest() for h in hashes]


def _count(stream: Stream, generator: random.Random | None) -> int:
    left = len(stream.tokens) - stream.num_computed
    return left if generator is None else min(left, generator.choice((1, 3, 16, 40)))


def _member(connection: Connection, rank: int, role: str, folder: str, prompts: list[list[int]], num_new: int) -> None:
    """One process of the mesh."""
    torch.set_num_threads(1)
    checkpoint = Checkpoint(folder)
    headers: queue.SimpleQueue[StepHeader] = queue.SimpleQueue()
    config = checkpoint.config
    mesh = ClusterMesh(
        f"member{rank}#0",
        attention=role == "attention",
        experts=LocalExpertMLP(checkpoint) if role == "expert" else None,
        shape=RowShape(hidden_size=config.hidden_size, top_k=config.top_k, dtype=torch.float32),
        options=MeshOptions(cluster_token="parity"),
    )
    mesh.start(headers.put)
    model = MeshModel(folder, mesh, headers) if role == "attention" else None
    connection.send(mesh.member)
    mesh.prepare(connection.recv())
    connection.send("prepared")
    connection.recv()
    mesh.commit(1)
    if model is not None:
        connection.send(_run_streams(model, prompts, num_new, random.Random(rank)))
        connection.recv()
    else:
        threading.Thread(target=_serve, args=(mesh, headers), daemon=True).start()
        connection.recv()
    mesh.close()


def _serve(mesh: ClusterMesh, headers: "queue.SimpleQueue[StepHeader]") -> None:
    while True:
        mesh.enter(headers.get()).serve()


def _receive(pipe: Connection) -> Any:
    if not pipe.poll(_TIMEOUT_S):
        raise TimeoutError(f"a process of the mesh sent nothing for {_TIMEOUT_S} s")
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError("a process of the mesh ended early; its own error is printed above") from None
