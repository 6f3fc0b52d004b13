"""Two GPUs survive a death: a process is killed in a captured step, streams go on, and no token is another one.

    python -P -m expertmesh.bench.death_drill [--case 30b --layers 8 --streams 8 --tokens 384] [--only a|b]

(a) *Colocated*, all experts on both ranks. Rank 1 is killed; rank 0 goes on in an epoch of one rank, and rank 1's
    streams go on there with the tokens they have; a fresh process joins, both serve; it drains, rank 0 goes on alone.
(b) *Disaggregated*, one attention rank and one shard. The shard is killed; streams wait in place; a fresh process,
    started at the death, loads the experts and takes its place.

Every stream's tokens are compared with those of a run of the same requests that nothing disturbs. Streams that move to
another rank change its batch, so engines are in batch-invariant mode (with --plain (a) may differ). Real meshes,
engines, agents and membership, without Ray. Exits 1 where a token differs.
(CPU: --device cpu --case tiny --layers 2.)"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from ..cluster.membership import uniform_place
from ..config import ExchangeConfig, SchedulerConfig
from ..request import EngineRequest, SamplingParams
from ..router.mesh import ClusterMesh
from .member_world import MemberWorld, Watched, WorldOptions
from .step_cases import CASES

PROMPT_TOKENS = 48


@dataclass
class Drill:
    """One layout's run."""

    arguments: argparse.Namespace
    mesh_type: type[ClusterMesh] = ClusterMesh

    def __post_init__(self) -> None:
        arguments = self.arguments
        self.options = WorldOptions(
            case=arguments.case,
            num_layers=arguments.layers,
            device=arguments.device,
            exchange=ExchangeConfig(
                backend=arguments.backend, timeout_base_s=arguments.deadline, timeout_per_row_s=0.0
            ),
            scheduler=SchedulerConfig(max_num_seqs=2 * arguments.streams, max_num_batched_tokens=512),
            kv_memory_bytes=arguments.kv_mib << 20,
            batch_invariant=not arguments.plain,
            mesh_type=self.mesh_type,
            isolated=not arguments.all_visible,
            patience_s=arguments.patience,
        )
        raw = CASES[arguments.case]
        self.num_layers = arguments.layers or raw["num_hidden_layers"]
        self.num_experts, self.vocab_size = raw["num_experts"], raw["vocab_size"]
        self.num_runs = 0
        self.wrong: list[str] = []

    def gpu(self, rank: int) -> int:
        return 0 if self.arguments.share_gpu else rank

    def requests(self, who: int) -> list[EngineRequest]:
        """The same prompts in every run."""
        self.num_runs += 1
        return [
            EngineRequest(
                request_id=f"r{self.num_runs}-{who}-{i}",
                prompt_ids=tuple(random.Random(100 * who + i).choices(range(self.vocab_size), k=PROMPT_TOKENS)),
                sampling=SamplingParams(max_tokens=self.arguments.tokens),
            )
            for i in range(self.arguments.streams)
        ]

    def compare(self, what: str, streams: Sequence[Watched], truth: Sequence[list[int]]) -> bool:
        """Token by token; a stream that ended otherwise than by its length is wrong too."""
        different = []
        for stream, tokens in zip(streams, truth, strict=True):
            if stream.token_ids != tokens or stream.end != "LENGTH":
                at = next(
                    (i for i, (a, b) in enumerate(zip(stream.token_ids, tokens)) if a != b), len(stream.token_ids)
                )
                different.append(f"{stream.request.request_id} from token {at} ({stream.end})")
        if different:
            self.wrong.append(f"{what}: {len(different)} of {len(streams)} streams differ: {different[0]}")
        return not different

    def colocated(self) -> dict[str, Any]:
        place = uniform_place(self.num_layers, self.num_experts, self.num_experts)
        times: dict[str, Any] = {}
        with MemberWorld(self.options, num_attention=2, num_expert=2, place=place) as world:
            started = perf_counter()
            for rank in range(2):
                world.start(f"rank{rank}", "colocated", self.gpu(rank))
            world.wait_for_epoch(["rank0", "rank1"])
            times["ready_s"] = perf_counter() - started
            self._warm(world, ["rank0", "rank1"])
            truth = self._truth(world, ["rank0", "rank1"])
            mine = world.submit("rank0", self.requests(0))
            theirs = world.submit("rank1", self.requests(1))
            self._in_the_middle(world, [*mine, *theirs])
            times["captures, replays before"] = [world.ask(name, "captures") for name in ("rank0", "rank1")]
            killed = world.kill("rank1")
            number = world.wait_for_epoch(["rank0"])
            times["epoch_of_one_s"] = perf_counter() - killed
            world.move([s for s in theirs if not s.end], "rank0")
            world.start("rank2", "colocated", self.gpu(1))
            world.wait([*mine, *theirs])
            times |= _pauses("survivor", mine, killed) | _pauses("moved", theirs, killed)
            times["epoch"] = number
            same = self.compare("(a) after the death", [*mine, *theirs], truth[0] + truth[1])
            alone = world.submit("rank0", self.requests(0))  # running while the replacement joins
            joined = perf_counter()
            world.wait_for_epoch(["rank0", "rank2"])
            times["join_after_load_s"] = perf_counter() - joined
            world.wait(alone)
            self._warm(world, ["rank0", "rank2"])
            both = [*world.submit("rank0", self.requests(0)), *world.submit("rank2", self.requests(1))]
            world.wait(both)
            same &= self.compare("(a) while it joins", alone, truth[0])
            same &= self.compare("(a) with the replacement", both, truth[0] + truth[1])
            last = world.submit("rank0", self.requests(0))
            self._in_the_middle(world, last)
            started = perf_counter()
            times["drained"] = world.drain("rank2")
            times["drain_s"] = perf_counter() - started
            world.wait_for_epoch(["rank0"])
            world.wait(last)
            same &= self.compare("(a) while it drains", last, truth[0])
            times |= _pauses("drain", last, started)
        return {"drill": "a", "identical": same, **times}

    def disaggregated(self) -> dict[str, Any]:
        place = uniform_place(self.num_layers, self.num_experts, 0)
        times: dict[str, Any] = {}
        with MemberWorld(self.options, num_attention=1, num_expert=1, place=place) as world:
            world.start("attention", "attention", 0)
            world.start("shard", "expert", self.gpu(1))
            world.wait_for_epoch(["attention", "shard"])
            self._warm(world, ["attention"])
            (truth,) = self._truth(world, ["attention"])
            streams = world.submit("attention", self.requests(0))
            self._in_the_middle(world, streams)
            times["captures, replays before"] = world.ask("attention", "captures")
            killed = world.kill("shard")
            world.start("shard2", "expert", self.gpu(1))
            number = world.wait_for_epoch(["attention", "shard2"])
            times["epoch_with_replacement_s"], times["epoch"] = perf_counter() - killed, number
            world.wait(streams)
            times |= _pauses("streams", streams, killed)
            same = self.compare("(b) after the replacement", streams, truth)
        return {"drill": "b", "identical": same, **times}

    def _warm(self, world: MemberWorld, names: Sequence[str]) -> None:
        """Every bucket on the way is met and captured."""
        for _ in range(2):
            world.wait([s for i, name in enumerate(names) for s in world.submit(name, self.requests(i))])

    def _truth(self, world: MemberWorld, names: Sequence[str]) -> list[list[list[int]]]:
        """Of a run that nothing disturbs, and of another that must say the same."""
        runs = []
        for _ in range(2):
            streams = [world.submit(name, self.requests(i)) for i, name in enumerate(names)]
            world.wait([s for mine in streams for s in mine])
            runs.append([[s.token_ids for s in mine] for mine in streams])
        if runs[0] != runs[1]:
            self.wrong.append("two undisturbed runs differ: this model and layout are not exact here")
        return runs[0]

    def _in_the_middle(self, world: MemberWorld, streams: Sequence[Watched]) -> None:
        enough = self.arguments.tokens // 4
        world.wait_for(lambda: all(len(s.token_ids) >= enough for s in streams))
        assert not any(s.end for s in streams), "streams end before anything happens: more --tokens"


def _pauses(name: str, streams: Sequence[Watched], since: float) -> dict[str, float]:
    """The longest silence of any stream that spans or follows `since`, and the typical one before."""
    longest, usual = 0.0, []
    for stream in streams:
        gaps = list(zip(stream.times_s, stream.times_s[1:], strict=False))
        longest = max([longest, *[b - a for a, b in gaps if b > since]])
        usual += [b - a for a, b in gaps if b <= since]
    return {f"{name}_pause_s": longest, f"{name}_usual_gap_s": sorted(usual)[len(usual) // 2] if usual else 0.0}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="30b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--streams", type=int, default=8, help="of each attention rank")
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument("--deadline", type=float, default=30.0, help="exchange.timeout_base_s")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds until a wait is in vain")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--plain", action="store_true", help="not batch-invariant: tokens may change with the batch")
    parser.add_argument("--share-gpu", action="store_true", help="all members on one GPU")
    parser.add_argument("--all-visible", action="store_true", help="each process sees all GPUs")
    parser.add_argument("--kv-mib", type=int, default=2048)
    parser.add_argument("--only", choices=["a", "b"])
    parser.add_argument("--json")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    drill, results = Drill(arguments), []
    for name, run in (("a", drill.colocated), ("b", drill.disaggregated)):
        if arguments.only in (None, name):
            results.append(run())
            print(json.dumps(results[-1]), flush=True)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)
    for line in drill.wrong:
        print("DIFFERENT", line)
    sys.exit(1 if drill.wrong or not all(result["identical"] for result in results) else 0)


if __name__ == "__main__":
    main()
