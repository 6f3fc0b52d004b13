"""Is the model exact? `make parity`: against transformers in float32, and against itself in every arrangement.

For each configuration (see `CONFIGURATIONS`), on random weights:
- **logits** with the reference's recorded routing injected: max abs error / row RMS <= 1e-4;
- **routing** compared apart: other experts only where the reference's own gap is < 1e-5, on <= 0.1 % of tokens;
- **greedy**: 64 tokens for 20 prompts equal the reference's, up to a position where its top two are closer than 1e-4
  (counted), or that follows a routing tie as above (counted apart, and checked with the reference's routing injected);
- **bits**: logits of 1, 2 and 4 shards and of arbitrary placements are equal bit for bit, and so are those of a prompt
  alone, in chunks of any size, inside a running mixed batch of 32, and with rows of another attention replica in the
  same expert products (batch-invariant mode); once, with 1 and 2 replicas and 2 and 4 shards as processes over gloo.
The cost of batch-invariant mode is measured beside it. Exits 1 where anything falls short; the last line is JSON."""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..make_checkpoint import make_checkpoint
from ..model_config import ModelConfig
from ..router.placement import Placement, uniform
from .configurations import CONFIGURATIONS, MOE, Configuration
from .in_process import InProcessModel
from .mesh_world import digests_alone, digests_over_mesh
from .reference import Recorded, Reference

LOGITS_TOLERANCE = 1e-4  # max abs error / RMS of the row
ROUTING_GAP = 1e-5
ROUTING_SHARE = 1e-3  # of token-layer decisions
GREEDY_MARGIN = 1e-4


@dataclass(slots=True, kw_only=True)
class Result:
    """What one configuration showed. `failures` empty = it holds."""

    name: str
    logits_error: float = 0.0
    routing_decisions: int = 0
    routing_differences: int = 0
    routing_widest_gap: float = 0.0  # largest reference gap at which the experts differed
    greedy_identical: int = 0
    greedy_prompts: int = 0
    greedy_close_calls: int = 0  # diverged where the reference's margin was below the bound
    greedy_routing_ties: int = 0  # diverged after a routing tie of the reference (gap below the routing bound)
    bit_checks: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -P -m expertmesh.bench.parity", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--prompts", type=int, default=20, help="greedy prompts a configuration (default 20)")
    parser.add_argument("--tokens", type=int, default=64, help="greedy tokens a prompt (default 64)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = []
    for configuration in CONFIGURATIONS:
        if args.only in configuration.name:
            results.append(check(configuration, num_prompts=args.prompts, num_tokens=args.tokens))
            print(_line(results[-1]), flush=True)
    processes = check_processes()
    print("over processes (gloo): " + ("; ".join(processes["failures"]) or f"ok, {processes['seconds']} s"), flush=True)
    cost = measure_cost()
    print("batch-invariant mode costs: " + ", ".join(f"{k} {v:.2f}" for k, v in cost.items()))
    ok = bool(results) and not any(r.failures for r in results) and not processes["failures"]
    print(json.dumps({"ok": ok, "processes": processes, "cost": cost, "configurations": [asdict(r) for r in results]}))
    return 0 if ok else 1


def check(
    configuration: Configuration, *, num_prompts: int = 20, num_tokens: int = 64, num_streams: int = 32, seed: int = 0
) -> Result:
    """All checks of one configuration, in a temporary folder."""
    started = time.monotonic()
    result = Result(name=configuration.name)
    with tempfile.TemporaryDirectory(prefix="expertmesh-parity-") as folder:
        arguments = {"dtype": "float32"} | configuration.checkpoint
        make_checkpoint(folder, configuration.config, seed=seed, **arguments)
        ours, reference = InProcessModel(folder), Reference(folder)
        generator = random.Random(seed)
        check_logits_and_routing(result, ours, reference, generator)
        check_greedy(result, ours, reference, generator, num_prompts, num_tokens)
        check_bits(result, folder, ours, generator, num_streams)
    result.seconds = round(time.monotonic() - started, 1)
    return result


def check_logits_and_routing(
    result: Result, ours: InProcessModel, reference: Reference, generator: random.Random
) -> None:
    for length in (1, 2, 47, 200, 350, 400):
        prompt = random_prompt(generator, length, ours.config.vocab_size)
        recorded = reference.record(prompt)
        ours.model.routing_hook = _compare_and_inject(result, recorded)
        stream = ours.open(prompt)
        (logits,) = ours.run([(stream, length)], all_rows=True)
        ours.close(stream)
        ours.model.routing_hook = None
        row_rms = recorded.logits.pow(2).mean(dim=-1).sqrt()
        error = ((logits - recorded.logits).abs().amax(dim=-1) / row_rms).max().item()
        result.logits_error = max(result.logits_error, error)
    if not result.logits_error <= LOGITS_TOLERANCE:
        result.failures.append(f"logits error {result.logits_error:.2e} > {LOGITS_TOLERANCE}")
    if result.routing_differences > ROUTING_SHARE * result.routing_decisions:
        result.failures.append(f"{result.routing_differences} of {result.routing_decisions} routings differ")
    if result.routing_widest_gap >= ROUTING_GAP:
        result.failures.append(f"routing differs at a reference gap of {result.routing_widest_gap:.2e}")


def check_greedy(
    result: Result,
    ours: InProcessModel,
    reference: Reference,
    generator: random.Random,
    num_prompts: int,
    num_tokens: int,
) -> None:
    lengths = [11] * (num_prompts // 2) + [70] * (num_prompts - num_prompts // 2)
    prompts = [random_prompt(generator, length, ours.config.vocab_size) for length in lengths]
    made = ours.greedy(prompts, num_tokens)
    wanted = []
    for length in sorted(set(lengths)):
        wanted += reference.greedy([p for p in prompts if len(p) == length], num_tokens)
    result.greedy_prompts = num_prompts
    for index, (tokens, want) in enumerate(zip(made, wanted)):
        first = next((i for i, pair in enumerate(zip(tokens, want.token_ids)) if pair[0] != pair[1]), None)
        if first is None:
            result.greedy_identical += 1
        elif want.margins[first] < GREEDY_MARGIN:
            result.greedy_close_calls += 1
        elif explained_by_routing_tie(ours, reference, prompts[index] + want.token_ids[:first]):
            result.greedy_routing_ties += 1
        else:
            result.failures.append(f"prompt {index}: token {first} differs at a margin of {want.margins[first]:.2e}")
    if num_prompts > 1 and len({tuple(tokens) for tokens in made}) == 1:
        result.failures.append("degenerate model: all prompts continue alike")


def explained_by_routing_tie(ours: InProcessModel, reference: Reference, tokens: Sequence[int]) -> bool:
    """True when the reference's own choice of experts hangs by less than ROUTING_GAP somewhere in `tokens`, and with
    that choice injected our next token is its. Such a tie falls either way in other arithmetic, to other experts."""
    recorded = reference.record(tokens)
    narrowest = min((float(gaps.min()) for gaps in recorded.gaps.values()), default=1.0)
    ours.model.routing_hook = _compare_and_inject(Result(name=""), recorded)
    stream = ours.open(tokens)
    (logits,) = ours.run([(stream, len(tokens))])
    ours.close(stream)
    ours.model.routing_hook = None
    return narrowest < ROUTING_GAP and int(logits[0].argmax()) == int(recorded.logits[-1].argmax())


def check_bits(
    result: Result, folder: str | Path, ours: InProcessModel, generator: random.Random, num_streams: int
) -> None:
    """Logits of all prompts, whole and alone, are the truth; every other arrangement must give the same bits."""
    lengths = [1, 2, 63, 64, 65, 150] + [generator.randint(3, 80) for _ in range(num_streams - 6)]
    prompts = [random_prompt(generator, length, ours.config.vocab_size) for length in lengths]
    alone = [in_chunks(ours, prompt, [len(prompt)]) for prompt in prompts]

    def expect(what: str, got: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> None:
        result.bit_checks += len(got)
        wrong = sum(not torch.equal(a, b) for a, b in zip(got, truth))
        if wrong:
            result.failures.append(f"{what}: bits of {wrong} of {len(got)} prompts differ")

    for size in (1, 7, 16, 50):
        chunked = [in_chunks(ours, prompt, [size] * len(prompt)) for prompt in prompts[:8]]
        expect(f"chunks of {size}", chunked, alone)
    expect(f"mixed batch of {num_streams}", mixed(ours, prompts, generator), alone)
    for what, placement in placements(ours.config, generator):
        sharded = InProcessModel(folder, placement=placement)
        expect(what, mixed(sharded, prompts, generator), alone)
        sharded.num_other_rows = 30
        expect(f"{what}, rows of another replica beside", mixed(sharded, prompts, generator), alone)


def check_processes(seed: int = 0) -> dict[str, Any]:
    """1 replica x 2 shards and 2 replicas x 4 shards as processes over gloo: bits of every stream as if alone."""
    started, failures, compared = time.monotonic(), [], 0
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="expertmesh-parity-") as folder:
        make_checkpoint(folder, MOE, seed=seed, dtype="float32")
        model = InProcessModel(folder)
        config = model.config
        prompts = [random_prompt(generator, length, config.vocab_size) for length in (5, 64, 100, 1, 33, 70, 12, 150)]
        truth = digests_alone(model, prompts, 6)
        even = uniform(config.num_layers, config.num_experts, 2, moe_layers=config.moe_layer_ids)
        mixed_up = shuffled(config, 4, config.num_experts // 4 + 3, generator)
        for num_replicas, placement in ((1, even), (2, mixed_up)):
            got = digests_over_mesh(folder, prompts, 6, num_replicas=num_replicas, placement=placement)
            compared += len(got)
            wrong = sum(a != b for a, b in zip(got, truth))
            if wrong:
                world = f"{num_replicas} replicas x {placement.ep_size} shards"
                failures.append(f"{world}: bits of {wrong} of {len(got)} streams differ")
    return {"failures": failures, "streams_compared": compared, "seconds": round(time.monotonic() - started, 1)}


def placements(config: ModelConfig, generator: random.Random) -> list[tuple[str, Placement]]:
    if not config.moe_layer_ids:
        return []
    made = []
    for ep_size in (2, 4):
        even = uniform(config.num_layers, config.num_experts, ep_size, moe_layers=config.moe_layer_ids)
        made.append((f"{ep_size} shards", even))
    made.append(("4 shards, shuffled with copies", shuffled(config, 4, config.num_experts // 4 + 3, generator)))
    return made


def shuffled(config: ModelConfig, ep_size: int, slots_per_rank: int, generator: random.Random) -> Placement:
    """Every layer its own random order, spare slots holding second copies or nothing."""
    size = ep_size * slots_per_rank
    table = torch.full((config.num_layers, size), -1, dtype=torch.int32)
    for layer_id in config.moe_layer_ids:
        experts = list(range(config.num_experts))
        spare = [generator.choice([-1, *experts]) for _ in range(size - len(experts))]
        row = experts + spare
        generator.shuffle(row)
        table[layer_id] = torch.tensor(row, dtype=torch.int32)
    return Placement(1, config.num_experts, ep_size, table)


def in_chunks(model: InProcessModel, prompt: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """Logits [len(prompt), vocab] of a prompt alone, computed in these chunks."""
    stream, out = model.open(prompt), []
    for size in sizes:
        count = min(size, len(prompt) - stream.num_computed)
        if count:
            out += model.run([(stream, count)], all_rows=True)
    model.close(stream)
    return torch.cat(out)


def mixed(model: InProcessModel, prompts: Sequence[Sequence[int]], generator: random.Random) -> list[torch.Tensor]:
    """Logits of all prompts run together, each step a random mix of single tokens and chunks in random order."""
    streams = [model.open(prompt) for prompt in prompts]
    out: list[list[torch.Tensor]] = [[] for _ in prompts]
    while any(s.num_computed < len(s.tokens) for s in streams):
        work = [(i, s) for i, s in enumerate(streams) if s.num_computed < len(s.tokens)]
        generator.shuffle(work)
        sizes = [min(generator.choice((1, 1, 1, 5, 16, 40)), len(s.tokens) - s.num_computed) for _, s in work]
        made = model.run([(s, size) for (_, s), size in zip(work, sizes)], all_rows=True)
        for (i, _), logits in zip(work, made):
            out[i].append(logits)
    for stream in streams:
        model.close(stream)
    return [torch.cat(parts) for parts in out]


def measure_cost() -> dict[str, float]:
    """Tokens per CPU second of batch-invariant and plain mode, and the ratio of times, on a small MoE."""
    config = MOE | {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 64, "num_hidden_layers": 4}
    generator = random.Random(0)
    figures: dict[str, float] = {}
    prompts = [random_prompt(generator, 100, 1000) for _ in range(32)]
    with tempfile.TemporaryDirectory(prefix="expertmesh-parity-") as folder:
        make_checkpoint(folder, config, dtype="float32")
        models = {mode: InProcessModel(folder, batch_invariant=mode == "invariant") for mode in ("invariant", "plain")}
        for what, count, num_new in (("prefill", 32, 0), ("decode at 1", 1, 20), ("decode at 32", 32, 20)):
            rates = {mode: _best_rate(model, prompts[:count], num_new) for mode, model in models.items()}
            figures |= {f"{what} {mode} tokens per CPU s": round(rate, 1) for mode, rate in rates.items()}
            figures[f"{what} time ratio"] = round(rates["plain"] / rates["invariant"], 3)
    return figures


def _best_rate(model: InProcessModel, prompts: Sequence[Sequence[int]], num_new: int) -> float:
    """Tokens per second of this process's one thread, in the prefill (num_new 0) or in decode; best of five."""
    best = 0.0
    for _ in range(5):
        streams = [model.open(p, num_tokens=len(p) + num_new) for p in prompts]
        started = time.process_time()
        model.run([(s, len(s.tokens)) for s in streams])
        elapsed, count = time.process_time() - started, sum(len(p) for p in prompts)
        if num_new:
            for stream in streams:
                stream.tokens += [1] * num_new
            started = time.process_time()
            for _ in range(num_new):
                model.run([(s, 1) for s in streams])
            elapsed, count = time.process_time() - started, num_new * len(prompts)
        for stream in streams:
            model.close(stream)
        best = max(best, count / elapsed)
    return best


def _compare_and_inject(
    result: Result, recorded: Recorded
) -> Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    def hook(layer_id: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        want = recorded.topk_ids[layer_id]
        differ = (topk_ids.long().sort(dim=-1).values != want.sort(dim=-1).values).any(dim=-1)
        result.routing_decisions += len(want)
        result.routing_differences += int(differ.sum())
        if bool(differ.any()):
            result.routing_widest_gap = max(result.routing_widest_gap, recorded.gaps[layer_id][differ].max().item())
        return want.to(torch.int32), recorded.topk_weights[layer_id].float()

    return hook


def random_prompt(generator: random.Random, length: int, vocab_size: int) -> list[int]:
    return [generator.randrange(vocab_size) for _ in range(length)]


def _line(result: Result) -> str:
    verdict = "ok" if not result.failures else "FAILED: " + "; ".join(result.failures)
    return (
        f"{result.name}: logits {result.logits_error:.1e}, routing {result.routing_differences}/"
        f"{result.routing_decisions} differ, greedy {result.greedy_identical}/{result.greedy_prompts} identical "
        f"(+{result.greedy_close_calls} close calls, +{result.greedy_routing_ties} routing ties), "
        f"{result.bit_checks} bit checks, {result.seconds} s: {verdict}"
    )


if __name__ == "__main__":
    sys.exit(main())
