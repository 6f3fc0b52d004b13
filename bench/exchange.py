"""What moving the rows of one MoE layer costs on CPU: one attention process and N shards over gloo, no expert product.

    python -P -m expertmesh.bench.exchange [--shards 2] [--hidden 2048] [--tokens 1 8 32] [--steps 200]

Per (tokens, dtype): the source's time in plan, dispatch, waiting and combine of one layer, p50 and p99 over the layers,
the processor time of the source's process (Gloo's thread included; steady where the machine is busy with other things),
and the bytes that travel. The shards answer with rows they have ready, so what is timed is the exchange alone."""

import argparse
import json
import multiprocessing
import statistics
from multiprocessing.connection import Connection
from time import perf_counter, process_time

import torch

from ..router.dispatch import plan
from ..router.epoch import Epoch, Member, StepHeader
from ..router.exchange import RowShape, weighted_sum
from ..router.exchange_gloo import GlooExchange
from ..router.group import RendezvousStore, build_gloo
from ..router.guard import all_finite
from ..router.placement import uniform

HOST, NUM_LAYERS, NUM_EXPERTS, TOP_K = "127.0.0.1", 8, 128, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    store = RendezvousStore(HOST)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    settings = (arguments.shards, arguments.hidden, arguments.tokens, arguments.steps, store.port)
    processes = [
        context.Process(target=_rank, args=(rank, theirs if rank == 0 else None, *settings), daemon=True)
        for rank in range(1 + arguments.shards)
    ]
    for process in processes:
        process.start()
    results = ours.recv()
    for process in processes:
        process.join(timeout=10)
    for row in results:
        print(
            f"{row['dtype']:9} {row['tokens']:5} tokens  p50 {row['p50_us']:7.0f} us  p99 {row['p99_us']:7.0f} us  "
            f"of it plan {row['plan_us']:.0f}, dispatch {row['dispatch_us']:.0f}, return {row['return_us']:.0f}, "
            f"weighted sum {row['sum_us']:.0f}; processor {row['cpu_us']:.0f}; {row['bytes']} bytes"
        )
    print(json.dumps({"shards": arguments.shards, "hidden": arguments.hidden, "layers": results}))


def _rank(
    rank: int, connection: Connection | None, shards: int, hidden: int, tokens: list[int], steps: int, port: int
) -> None:
    torch.set_num_threads(1)
    members = tuple(Member(member_id=str(i), attention=i == 0, expert=i > 0) for i in range(1 + shards))
    placement = uniform(NUM_LAYERS, NUM_EXPERTS, shards)
    results: list[dict[str, object]] = []
    for dtype in (torch.float32, torch.bfloat16):
        epoch = Epoch(
            number=1, members=members, placement=placement, rendezvous_key=str(dtype), store_host=HOST, store_port=port
        )
        shape = RowShape(hidden_size=hidden, top_k=TOP_K, dtype=dtype)
        group = build_gloo(epoch, rank, interface=HOST, timeout_s=60.0)
        exchange = GlooExchange(group, epoch, rank, shape, timeout_base_s=30.0, timeout_per_row_s=0.0)
        for num_tokens in tokens:
            results.append(_measure(rank, exchange, epoch, shape, num_tokens, steps))
        group.barrier().wait()
    if connection is not None:
        connection.send(results)


def _measure(
    rank: int, exchange: GlooExchange, epoch: Epoch, shape: RowShape, num_tokens: int, steps: int
) -> dict[str, object]:
    placement, generator = epoch.placement, torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, shape.hidden_size, generator=generator).to(shape.dtype)
    answers = torch.zeros(num_tokens * TOP_K, shape.hidden_size, dtype=shape.dtype)
    ids = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(1)[:, :TOP_K].to(torch.int32)
    weights = torch.rand(num_tokens, TOP_K, generator=generator)
    times: list[tuple[float, float, float, float]] = []
    num_bytes = 0
    cpu_started = process_time()
    for step_id in range(1, steps + 1):
        num_sent = (num_tokens, *[0] * (len(epoch.members) - 1))
        exchange.begin(
            StepHeader(step_id=step_id, epoch=1, placement_version=1, num_tokens=num_sent), placement.moe_layers
        )
        for layer_id in placement.moe_layers:
            started = perf_counter()
            if rank:
                handle = exchange.dispatch(layer_id, None, None)
                exchange.combine(answers[: sum(c[2] for c in handle.source_counts)], handle)
                continue
            source_plan = plan(ids, placement, layer_id)
            planned = perf_counter()
            handle = exchange.dispatch(layer_id, source_plan, x)
            sent = perf_counter()
            returned = exchange.combine(answers[:0], handle)
            received = perf_counter()
            assert returned is not None
            summed = weighted_sum(returned, source_plan, weights)
            if not all_finite(summed):
                raise AssertionError("a sum is not finite")
            times.append((planned - started, sent - planned, received - sent, perf_counter() - received))
            row_bytes = shape.hidden_size * shape.dtype.itemsize
            num_bytes = (source_plan.num_rows + source_plan.num_pairs) * row_bytes
        if exchange.verify():
            raise AssertionError("rows were damaged")
    if rank:
        return {}
    cpu_us = (process_time() - cpu_started) / (steps * NUM_LAYERS) * 1e6
    times = times[len(times) // 10 :]
    totals = sorted(sum(t) for t in times)
    plan_us, dispatch_us, return_us, sum_us = (statistics.median(part) * 1e6 for part in zip(*times, strict=True))
    return {
        "dtype": str(shape.dtype).removeprefix("torch."),
        "tokens": num_tokens,
        "p50_us": round(totals[len(totals) // 2] * 1e6, 1),
        "p99_us": round(totals[int(len(totals) * 0.99)] * 1e6, 1),
        "plan_us": round(plan_us, 1),
        "dispatch_us": round(dispatch_us, 1),
        "return_us": round(return_us, 1),
        "sum_us": round(sum_us, 1),
        "cpu_us": round(cpu_us, 1),
        "bytes": num_bytes,
    }


if __name__ == "__main__":
    main()
