"""What moving the rows of one MoE layer costs between two GPUs of a host: `peer` and `nccl`, beside bare all-to-alls.

    python -P -m expertmesh.bench.exchange_gpu [--tokens 1 32 128 1024] [--hidden 4096] [--tune] [--json FILE]

Two processes, a GPU each, both with attention and experts (128, top-8, even routing); every token sends its row to the
ranks that need it and gets eight rows back. Microseconds of one layer on the slower rank: dispatch (ids to the rows and
slots at their experts, packing included), answer, both, and both with the weighted sum; median of CUDA-graph replays of
20 layers each, so that launches cost what they cost in a captured step; eagerly where the host counts. NCCL with as
many channels as `--channels` says (0 = its own choice), in the form that it takes by itself and, where that is the
bounded one, as in a whole step too (`router/nccl_form.py`). `--tune` varies the blocks of the peer kernels."""

import argparse
import json
import multiprocessing
import os
import statistics
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import torch
from torch.distributed import AllToAllOptions

from ..config import ExchangeConfig
from ..kernels.combine import combine
from ..kernels.peer_exchange import set_max_blocks
from ..router.device_exchange import DeviceExchange
from ..router.epoch import WHOLE, Epoch, Member, StepHeader
from ..router.exchange import RowShape
from ..router.exchange_nccl import NcclExchange
from ..router.exchange_peer import build_peer
from ..router.group import RendezvousStore, build_nccl
from ..router.placement import uniform

HOST, NUM_EXPERTS, TOP_K, LAYERS, TIMED = "127.0.0.1", 128, 8, 20, 15
OPTIONS = ExchangeConfig()
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 128, 1024])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--channels", type=int, default=OPTIONS.nccl_channels)
    parser.add_argument("--early-next", action="store_true", help="peer: let the next kernel come while one waits")
    parser.add_argument("--all-visible", action="store_true", help="each process sees both GPUs")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if torch.cuda.device_count() < 2:
        raise SystemExit("exchange_gpu needs two GPUs of one host")
    name, store, context = torch.cuda.get_device_name(0), RendezvousStore(HOST), multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for rank in range(2):
        ours, theirs = context.Pipe()
        isolated = not arguments.all_visible
        early = arguments.early_next
        choices = arguments.tune, early, isolated, arguments.channels
        settings = (rank, theirs, arguments.hidden, arguments.tokens, *choices, store.port)
        processes.append(context.Process(target=_run, args=settings, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    rows = _slower(*[pipe.recv() for pipe in pipes])
    for pipe in pipes:
        pipe.send("end")
    for process in processes:
        process.join(timeout=10)
    print(f"2 x {name}, hidden {arguments.hidden} bf16, top-{TOP_K} of {NUM_EXPERTS}; us a layer, the slower rank")
    print(f"NCCL with {arguments.channels or 'as many as it likes'} channels")
    for row in rows:
        parts = ", ".join(f"{key} {value:.1f}" for key, value in row.items() if isinstance(value, float))
        print(f"{row['backend']:6} {row['tokens']:5} tokens {row['note']:24} {parts}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"device": name, "hidden": arguments.hidden, "rows": rows}, file, indent=1)


def _slower(first: list[Row], second: list[Row]) -> list[Row]:
    return [
        {key: max(value, other[key]) if isinstance(value, float) else value for key, value in row.items()}
        for row, other in zip(first, second, strict=True)
    ]


def _run(
    rank: int,
    connection: Connection,
    hidden: int,
    tokens: list[int],
    tune: bool,
    early_next: bool,
    isolated: bool,
    channels: int,
    port: int,
) -> None:
    if isolated:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)  # as a process of a cluster sees it
    device = torch.device("cuda", 0 if isolated else rank)
    torch.cuda.set_device(device)
    torch.cuda.set_stream(torch.cuda.Stream())
    try:
        rows = list(_Rank(rank, hidden, port, device).measure(tokens, tune, early_next, channels))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the other one waits on a device: the parent ends both
    connection.send(rows)
    connection.recv()
    os._exit(0)  # a communicator's end would wait for the other's


class _Rank:
    def __init__(self, rank: int, hidden: int, port: int, device: torch.device) -> None:
        self.rank, self.device = rank, device
        self.shape = RowShape(hidden_size=hidden, top_k=TOP_K, dtype=torch.bfloat16, device=self.device)
        members = tuple(Member(member_id=str(i), attention=True, expert=True) for i in range(2))
        self.epoch = Epoch(
            number=1,
            members=members,
            placement=uniform(1, NUM_EXPERTS, 2),
            rendezvous_key="bench",
            store_host=HOST,
            store_port=port,
        )
        self.step_id = 0

    def measure(self, tokens: list[int], tune: bool, early_next: bool, channels: int) -> Any:
        deadlines: dict[str, Any] = {"timeout_base_s": 20.0, "timeout_per_row_s": 0.0}
        capacity = max(tokens)
        peer = build_peer(
            self.epoch,
            self.rank,
            self.shape,
            capacity=capacity,
            epoch_timeout_s=30.0,
            early_next=early_next,
            **deadlines,
        )
        peer.use_placement(self.epoch.placement)
        for num_tokens in tokens:
            yield self.one("peer", "", peer, num_tokens)
            for blocks in (16, 32, 64, 128) if tune else ():
                set_max_blocks(dispatch=blocks, answer=blocks)
                yield self.one("peer", f"at most {blocks} blocks", peer, num_tokens)
                set_max_blocks(dispatch=64, answer=64)
        group = build_nccl(self.epoch, self.rank, self.device, channels=channels, timeout_s=60.0)
        exact_above = OPTIONS.nccl_exact_above
        nccl = NcclExchange(
            group, self.epoch, self.rank, self.shape, capacity=capacity, exact_above=exact_above, **deadlines
        )
        nccl.use_placement(self.epoch.placement)
        for num_tokens in tokens:
            bounded = nccl.forms.bound(num_tokens, whole=False)
            yield self.one("nccl", f"{bounded} of {TOP_K * num_tokens} places" if bounded else "", nccl, num_tokens)
            if bounded:
                yield self.one("nccl", "whole", nccl, num_tokens, WHOLE)
            yield self.bare(group, num_tokens)

    def one(self, name: str, note: str, exchange: DeviceExchange, num_tokens: int, flags: int = 0) -> Row:
        generator = torch.Generator().manual_seed(self.rank)
        x = torch.randn(num_tokens, self.shape.hidden_size, generator=generator).bfloat16().to(self.device)
        ids = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(1)[:, :TOP_K].to(torch.int32)
        ids = ids.to(self.device)
        weights = torch.rand(num_tokens, TOP_K, generator=generator).to(self.device)
        rows = torch.randn(2 * num_tokens, TOP_K, self.shape.hidden_size, device=self.device).bfloat16()
        self.step_id += 1
        header = StepHeader(
            step_id=self.step_id,
            epoch=1,
            placement_version=1,
            num_tokens=(num_tokens, num_tokens),
            bucket=num_tokens,
            flags=flags,
        )
        eagerly = exchange.graph_key(header) is None
        timer = _time_eagerly if eagerly else _time_in_graph
        exchange.begin(header, stride=num_tokens, attempt=0)

        def dispatch() -> torch.Tensor:
            return exchange.dispatch(0, x, ids, num_tokens)[0]

        def both() -> torch.Tensor:
            received = dispatch()
            y = exchange.combine(rows[: received.shape[0]])
            assert y is not None
            return y

        def summed() -> torch.Tensor:
            return combine(both(), ids, weights)

        result: Row = {"backend": name, "tokens": num_tokens, "note": note + ("eagerly, exact" if eagerly else "")}
        y = both()
        if not eagerly:
            expert = ids.long() // (NUM_EXPERTS // 2)
            wanted = rows.view(2, num_tokens, TOP_K, -1)[self.rank]  # of what this rank answers, its own part
            mine = expert == self.rank
            assert torch.equal(y[mine], wanted[mine]), "own rows came back wrong"
            result["dispatch"] = timer(dispatch)
            result["answer"] = timer(lambda: exchange.combine(rows))
        result["both"] = timer(both)
        result["with sum"] = timer(summed)
        exchange.end()
        torch.cuda.synchronize()
        verdict = exchange.verdict()
        assert (verdict.bad, verdict.overflow) == ((), -1)
        return result

    def bare(self, group: Any, num_tokens: int) -> Row:
        """As many bytes as are needed, in two all-to-alls without any packing."""
        there = torch.randn(2 * num_tokens, self.shape.hidden_size, device=self.device).bfloat16()
        back = torch.randn(TOP_K * num_tokens, self.shape.hidden_size, device=self.device).bfloat16()
        there_out, back_out = torch.empty_like(there), torch.empty_like(back)

        options = AllToAllOptions()
        options.asyncOp = False  # on the current stream, as ours

        def both() -> torch.Tensor:
            group.alltoall_base(there_out, there, [], [], options)
            group.alltoall_base(back_out, back, [], [], options)
            return back_out

        return {"backend": "bare", "tokens": num_tokens, "note": "all_to_all_single x 2", "both": _time_in_graph(both)}


def _time_in_graph(work: Callable[[], Any]) -> float:
    """Median microseconds of one call. Both ranks make the same calls, so they wait for each other, never for ever."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        for _ in range(LAYERS):
            work()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(3 + TIMED):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / LAYERS)
    graph.reset()
    return statistics.median(times[3:])


def _time_eagerly(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(3 + TIMED):
        torch.cuda.synchronize()
        started = perf_counter()
        for _ in range(LAYERS):
            work()
        torch.cuda.synchronize()
        times.append((perf_counter() - started) * 1e6 / LAYERS)
    return statistics.median(times[3:])


if __name__ == "__main__":
    main()
