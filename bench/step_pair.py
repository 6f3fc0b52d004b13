"""Several ranks of one host that share a model's experts, without Ray: milliseconds between steps against the floor.

Colocated: every rank is an attention replica and owns its part of the experts; the batch is that of all ranks
together, split evenly (a batch of one leaves the other ranks serving its rows alone). Real engines, meshes, agents and
membership (`member_world.py`), weights of noise, streams begun together; a step counts where it gave every stream of a
rank one token. The floor is that of `cluster/sizing.py` with even routing. Each back end of the exchange has a world of
its own. Exits 1 where an answer has the wrong length. The last line is JSON.

    python -P -m expertmesh.bench.step_pair --case 235b-fp8 --batches 1,32,128 --backends peer,nccl
    (on CPUs: --case tiny --layers 2 --device cpu --backends auto)"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch

from ..cluster.membership import uniform_place
from ..cluster.sizing import Form, Gpu, form_of, step_floor
from ..config import CacheConfig, ExchangeConfig, SchedulerConfig
from ..make_checkpoint import complete_config
from ..model_config import ModelConfig
from ..request import EngineRequest, SamplingParams
from ..router.mesh import ClusterMesh
from .member_world import MemberWorld, Watched, WorldOptions
from .step import WARM_UP_TOKENS, Broken, known_gpu, step_gaps
from .step_cases import CASES


@dataclass(frozen=True, slots=True, kw_only=True)
class PairDecode:
    backend: str
    batch: int  # over all ranks
    ms: float  # median between two steps that gave every stream of a rank one token
    ms_p90: float
    tokens_per_s: float  # of all ranks
    num_steps: int
    first_tokens_ms: float  # from submitting until every prompt has its first token
    floor_ms: float | None  # None on a CPU

    @property
    def times_floor(self) -> float | None:
        return self.ms / self.floor_ms if self.floor_ms else None


class PairBench:
    """One world, measured in turns."""

    def __init__(self, arguments: argparse.Namespace, backend: str, world: MemberWorld, config: ModelConfig) -> None:
        self.arguments, self.backend, self.world, self.config = arguments, backend, world, config
        self.names = [f"rank{rank}" for rank in range(arguments.ranks)]
        self._random, self._num_requests = random.Random(7), 0

    def start(self) -> float:
        """Seconds until all ranks serve."""
        began = perf_counter()
        for rank, name in enumerate(self.names):
            self.world.start(name, "colocated", rank)
        self.world.wait_for_epoch(self.names)
        return perf_counter() - began

    def decode(self, batch: int, gpu: Gpu | None, form: Form) -> PairDecode:
        prompt, output = self.arguments.prompt, self.arguments.output
        self._run(batch, min(output, WARM_UP_TOKENS))  # graphs are captured
        gaps: list[float] = []
        first: list[float] = []
        for _ in range(self.arguments.repeats):
            began = perf_counter()
            by_rank = self._run(batch, output)
            for streams in by_rank:
                gaps += step_gaps([stream.times_s for stream in streams])
            first.append(max(s.times_s[0] for streams in by_rank for s in streams) - began)
        if not gaps:
            raise Broken(f"batch {batch}: no two steps in a row gave every stream of a rank one token")
        ms, floor = 1e3 * statistics.median(gaps), None
        if gpu is not None:
            ranks = self.arguments.ranks
            floor = step_floor(
                self.config,
                gpu,
                batch=batch,
                context=prompt + output // 2,
                form=form,
                num_attention=ranks,
                num_shards=ranks,
            ).ms
        return PairDecode(
            backend=self.backend,
            batch=batch,
            ms=ms,
            ms_p90=1e3 * sorted(gaps)[int(0.9 * (len(gaps) - 1))],
            tokens_per_s=1e3 * batch / ms,
            num_steps=len(gaps),
            first_tokens_ms=1e3 * statistics.median(first),
            floor_ms=floor,
        )

    def _run(self, batch: int, output: int) -> list[list[Watched]]:
        """Streams of each rank that has some, ended."""
        ranks = len(self.names)
        shares = [batch // ranks + (rank < batch % ranks) for rank in range(ranks)]
        by_rank = [
            self.world.submit(name, [self._request(output) for _ in range(share)])
            for name, share in zip(self.names, shares, strict=True)
            if share
        ]
        streams = [stream for one in by_rank for stream in one]
        self.world.wait(streams, timeout_s=300.0)
        for stream in streams:
            if stream.end != "LENGTH" or len(stream.token_ids) != output:
                raise Broken(f"{len(stream.token_ids)} of {output} tokens on {stream.member}: {stream.end}")
        return by_rank

    def _request(self, output: int) -> EngineRequest:
        self._num_requests += 1
        return EngineRequest(
            request_id=f"{self.backend}{self._num_requests}",
            prompt_ids=tuple(self._random.choices(range(self.config.vocab_size), k=self.arguments.prompt)),
            sampling=SamplingParams(max_tokens=output),
        )


@contextmanager
def opened(
    arguments: argparse.Namespace, backend: str, raw: dict[str, Any], mesh_type: type[ClusterMesh] = ClusterMesh
) -> Iterator[PairBench]:
    config = ModelConfig.from_mapping(raw)
    most = -(-max(arguments.batches) // arguments.ranks)  # sequences of a rank
    tokens, block = arguments.prompt + arguments.output, CacheConfig().block_size
    on_gpu = arguments.device == "cuda"
    options = WorldOptions(
        case=arguments.case,
        num_layers=arguments.layers,
        device=arguments.device,
        exchange=ExchangeConfig(backend=backend),  # type: ignore[arg-type]
        scheduler=SchedulerConfig(
            max_num_seqs=most,
            max_num_batched_tokens=arguments.batched_tokens,
            max_prefill_tokens_per_step=arguments.batched_tokens,
            max_step_stretch=1e6,  # nobody waits for a token: all of a batch should soon decode
        ),
        kv_memory_bytes=(most + 1) * (tokens + 2 * block) * config.kv_bytes_per_token(2 if on_gpu else 4),
        mesh_type=mesh_type,
        max_model_len=tokens + block,
    )
    place = uniform_place(config.num_layers, config.num_experts, 0, moe_layers=config.moe_layer_ids)
    ranks = arguments.ranks
    with MemberWorld(options, num_attention=ranks, num_expert=ranks, place=place) as world:
        yield PairBench(arguments, backend, world, config)


def measure(arguments: argparse.Namespace, mesh_type: type[ClusterMesh] = ClusterMesh) -> dict[str, Any]:
    """Every back end, every batch; what broke ends its back end alone and is told."""
    raw = complete_config({"tie_word_embeddings": False} | CASES[arguments.case])
    if arguments.layers:
        raw["num_hidden_layers"] = arguments.layers
    form = form_of(raw)
    result: dict[str, Any] = {"case": arguments.case, "layers": arguments.layers, "ranks": arguments.ranks}
    result |= {"decode": [], "worlds": [], "broken": ""}
    for backend in arguments.backends:
        try:
            with opened(arguments, backend, raw, mesh_type) as bench:
                ready_s = bench.start()
                device = bench.world.ask("rank0", "facts")["device"]
                gpu = known_gpu(device)
                print(f"{arguments.ranks} x {device}, {backend}: ready after {ready_s:.1f} s", flush=True)
                for batch in arguments.batches:
                    found = bench.decode(batch, gpu, form)
                    result["decode"].append(asdict(found) | {"times_floor": found.times_floor})
                    print(_line(found), flush=True)
                facts = [bench.world.ask(name, "facts") for name in bench.names]
                result["worlds"].append({"backend": backend, "ready_s": ready_s, "ranks": facts})
        except (Broken, TimeoutError, RuntimeError) as error:
            result["broken"] += f"{backend}: {error}; "
            print(f"BROKEN: {backend}: {error}", flush=True)
    return result


def _line(found: PairDecode) -> str:
    floor = f", {found.times_floor:.2f} x floor {found.floor_ms:.2f}" if found.times_floor else ""
    return (
        f"{found.backend} batch {found.batch}: {found.ms:.2f} ms ({found.tokens_per_s:,.0f} tok/s){floor}; "
        f"p90 {found.ms_p90:.2f}, {found.num_steps} steps; first tokens {found.first_tokens_ms:.0f} ms"
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=tuple(CASES), default="235b-fp8")
    parser.add_argument("--layers", type=int, default=0, help="only so many layers; 0 = all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--backends", type=lambda text: text.split(","), default=["peer", "nccl"])
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 32, 128])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--batched-tokens", type=int, default=4096, help="of one rank's step")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    result = measure(make_parser().parse_args(argv))
    print(json.dumps(result), flush=True)
    return 1 if result["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
