"""The engine alone on one device: milliseconds between steps against the floor, prefill, and seconds to READY by phase.

A real engine in this process (scheduler, KV, sampling; a mesh of one), weights of noise that route as trained ones do.
The sequences of a batch begin together and run without an end of text; a decode step counts where it gave every
sequence one token. The floor reads every byte once (`cluster/sizing.py`), with the distinct experts that the batch was
seen to be routed to, else those of even routing. Prompt, output and median are those by which other engines were
measured: 128 + 128 tokens, greedy; prefill of 1 x 2048 and 16 x 1024 until each prompt has its first token.

Exits 1 where an answer has the wrong length or is not finite. The last line is JSON.

    python -m expertmesh.bench.step --case 30b --batches 1,8,32,128,256"""

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from ..cluster.attention.runner import Runner
from ..cluster.sizing import GPUS, Gpu, form_of, step_floor
from ..config import CacheConfig, SchedulerConfig
from ..request import EngineRequest, FinishReason, SamplingParams
from ..startup_phases import StartupPhases
from .local_engine import LocalEngine, Stream
from .profile import ProfileError, StepProfile, last_steps, set_floors, summarise, table, watch
from .step_cases import CASES, open_case

PROFILED_STEPS = 8
WARM_UP_TOKENS = 8  # a bucket runs eagerly, is captured, and is replayed


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    batch: int
    ms: float  # median between two steps that gave every sequence one token
    ms_p90: float
    tokens_per_s: float
    num_steps: int
    floor_ms: float | None  # None on a CPU
    distinct_experts: float | None  # of a layer, as seen; None = not seen

    @property
    def times_floor(self) -> float | None:
        return self.ms / self.floor_ms if self.floor_ms else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    num_prompts: int
    prompt_tokens: int
    ms: float  # median, until every prompt has its first token
    tokens_per_s: float


class Broken(Exception):
    """An answer is not what it must be."""


class StepBench:
    """One engine, measured in turns."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, torch.device(arguments.device)
        self.phases = StartupPhases()
        self.begun_s = time.time() - psutil.Process().create_time()  # imports
        with self.phases.phase("device"):
            if self.device.type == "cuda":
                torch.zeros(1, device=self.device)  # its context
        checkpoint = open_case(arguments.case, folder, num_layers=arguments.layers)
        self.config = checkpoint.config
        self.form = form_of(json.loads((folder / "config.json").read_text()))
        most = max([*arguments.batches, 16])
        scheduler = SchedulerConfig(
            max_num_batched_tokens=arguments.batched_tokens,
            max_prefill_tokens_per_step=arguments.batched_tokens,
            max_step_stretch=1e6,  # nobody waits for a token: all of a batch should soon decode
            max_num_seqs=most,
        )
        needed = most * (arguments.prompt + arguments.output)
        kv = 0 if self.device.type == "cuda" else needed * self.config.kv_bytes_per_token(4)
        cache = CacheConfig(enable_prefix_cache=False, kv_memory_bytes=max(kv, 64 << 20), kv_dtype=arguments.kv_dtype)
        self.engine = LocalEngine(
            checkpoint,
            cache=cache,
            scheduler=scheduler,
            batch_invariant=arguments.invariant or self.device.type == "cpu",
            device=self.device,
            max_model_len=max(4096, arguments.prompt + arguments.output),
            phases=self.phases,
        )
        self._random, self._num_requests = random.Random(5), 0
        if self.device.type == "cuda" and not _runs_graphs(self.engine.runner):
            raise Broken("attention runs in plain torch, without CUDA graphs: this is not the engine that is served")

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @property
    def gpu(self) -> Gpu | None:
        return known_gpu(self.device_name)

    def warm_up(self) -> None:
        """The first tokens: kernels are loaded, cuBLAS chooses."""
        with self.phases.phase("first tokens"):
            self.generate(1, prompt=16, output=2)

    # -- runs

    def generate(self, batch: int, *, prompt: int, output: int) -> list[Stream]:
        """`batch` answers of exactly `output` tokens, all begun together."""
        streams = self._begin(batch, prompt, output)
        self.engine.wait(list(streams))
        return [self._checked(stream, output) for stream in streams.values()]

    def decode(self, batch: int) -> Decode:
        prompt, output = self.arguments.prompt, self.arguments.output
        with self._routing(batch) as distinct:
            self.generate(batch, prompt=prompt, output=min(output, WARM_UP_TOKENS))
        gaps: list[float] = []
        for _ in range(self.arguments.repeats):
            streams = self.generate(batch, prompt=prompt, output=output)
            gaps += step_gaps([stream.token_times_s for stream in streams])
        if not gaps:
            raise Broken(f"batch {batch}: no two steps in a row gave every sequence one token")
        seen = statistics.mean(distinct) if distinct else None
        floor = None
        if self.gpu is not None:
            context = prompt + output // 2
            floor = step_floor(
                self.config,
                self.gpu,
                batch=batch,
                context=context,
                form=self.form,
                distinct=seen,
                kv_element_bytes=1 if self.arguments.kv_dtype == "fp8" else 2,
            ).ms
        ms = 1e3 * statistics.median(gaps)
        return Decode(
            batch=batch,
            ms=ms,
            ms_p90=1e3 * sorted(gaps)[int(0.9 * (len(gaps) - 1))],
            tokens_per_s=1e3 * batch / ms,
            num_steps=len(gaps),
            floor_ms=floor,
            distinct_experts=seen,
        )

    def prefill(self, num_prompts: int, prompt_tokens: int) -> Prefill:
        times = []
        for _ in range(2 + self.arguments.repeats):  # a bucket runs eagerly, is captured, and is replayed
            streams = self.generate(num_prompts, prompt=prompt_tokens, output=1)
            times.append(max(s.token_times_s[0] for s in streams) - self._released_s)
        ms = 1e3 * statistics.median(times[2:])
        return Prefill(
            num_prompts=num_prompts,
            prompt_tokens=prompt_tokens,
            ms=ms,
            tokens_per_s=1e3 * num_prompts * prompt_tokens / ms,
        )

    def profile(self, batches: Sequence[int]) -> list[StepProfile]:
        """Some decode steps of each batch, taken apart."""
        prompt, output = self.arguments.prompt, PROFILED_STEPS + 24
        for batch in batches:
            self.generate(batch, prompt=prompt, output=WARM_UP_TOKENS)
        runs = watch([partial(self.generate, batch, prompt=prompt, output=output) for batch in batches])
        found = []
        for batch, kernels in zip(batches, runs, strict=True):
            steps = last_steps(kernels, PROFILED_STEPS)
            found.append(summarise(steps, batch=batch, num_layers=self.config.num_layers))
            if self.gpu is not None:
                set_floors(found[-1], self.config, self.gpu, form=self.form, context=prompt + output)
        return found

    # -- pieces

    def _begin(self, batch: int, prompt: int, output: int) -> dict[str, Stream]:
        """Submit all, and let the engine bid only when it has them all: a step then takes as many as fit."""
        mesh, engine, vocab = self.engine.mesh, self.engine.engine, self.config.vocab_size
        bid, held = mesh.bid, []
        mesh.bid = lambda *wanted: held.append(wanted)  # type: ignore[method-assign]
        streams: dict[str, Stream] = {}
        for _ in range(batch):
            self._num_requests += 1
            request = EngineRequest(
                request_id=f"r{self._num_requests}",
                prompt_ids=tuple(self._random.randrange(min(vocab, engine.vocab_size)) for _ in range(prompt)),
                sampling=SamplingParams(max_tokens=output),
            )
            streams[request.request_id] = self.engine.submit(request)
        deadline = time.monotonic() + 30
        while engine.scheduler.num_waiting < batch or not held:
            if time.monotonic() > deadline:
                raise Broken(f"{engine.scheduler.num_waiting} of {batch} requests were queued after 30 s")
            time.sleep(0.0005)
        mesh.bid = bid  # type: ignore[method-assign]
        self._released_s = time.perf_counter()
        bid(0, batch * prompt)
        return streams

    def _checked(self, stream: Stream, output: int) -> Stream:
        end = stream.end
        if end is None or end.finish_reason is not FinishReason.LENGTH or len(stream.token_ids) != output:
            reason = end.finish_reason.name if end else "no end"
            raise Broken(f"{len(stream.token_ids)} of {output} tokens, {reason}: {end.error_message if end else ''}")
        return stream

    @contextmanager
    def _routing(self, batch: int) -> Iterator[list[float]]:
        """Distinct experts of each layer of each eager decode step of `batch` tokens; filled when the block is left."""
        found: list[float] = []
        seen: list[torch.Tensor] = []  # topk_ids
        if not self.config.num_experts:
            yield found
            return
        with _spied(self.engine.runner, seen):
            yield found
        for ids in seen:
            tokens = ids[ids[:, 0] >= 0]
            if tokens.shape[0] == batch:
                found.append(float(tokens.unique().numel()))


@contextmanager
def _spied(runner: Any, seen: list[torch.Tensor]) -> Iterator[None]:
    """Keep what the gate decides in eager steps."""
    if isinstance(runner, Runner):

        def hook(_: int, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            seen.append(ids.clone())
            return ids, weights

        runner.model.routing_hook = hook  # type: ignore[attr-defined]
        yield
        runner.model.routing_hook = None  # type: ignore[attr-defined]
        return
    model = runner.model
    route = model.route

    def spy(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, weights = route(*arguments)
        if not torch.cuda.is_current_stream_capturing() and ids.shape[0] <= 1024:
            seen.append(ids.clone())
        return ids, weights

    model.route = spy
    yield
    model.route = route


def _runs_graphs(runner: Any) -> bool:
    return bool(runner.runs_ahead and getattr(runner.attention, "capturable", False))


def known_gpu(device_name: str) -> Gpu | None:
    """A kind that was measured, by what the driver calls it."""
    return next((gpu for name, gpu in GPUS.items() if name in device_name), None)


def step_gaps(streams: Sequence[Sequence[float]]) -> list[float]:
    """Seconds between each two steps in a row that both gave every stream one token; of each stream its tokens'
    times."""
    counts = Counter(at for times in streams for at in times)
    steps = sorted(counts)
    return [b - a for a, b in itertools.pairwise(steps) if counts[a] == counts[b] == len(streams)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", choices=tuple(CASES), default="30b")
    parser.add_argument("--layers", type=int, default=0, help="only so many layers, for a model too large for the GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=_sizes, default=(1, 8, 32, 128, 256))
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batched-tokens", type=int, default=16384)
    parser.add_argument("--kv-dtype", choices=("auto", "bf16", "fp8"), default="auto", help="cache.kv_dtype")
    parser.add_argument("--invariant", action="store_true", help="batch-invariant mode, for its cost; always on a CPU")


@contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[StepBench]:
    with tempfile.TemporaryDirectory() as folder:
        bench = StepBench(Path(folder), arguments)
        with bench.engine:
            bench.warm_up()
            print(f"{bench.device_name}: {bench.begun_s:.1f} s of imports, then {bench.phases}", flush=True)
            yield bench


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--prefill", type=_prompts, default=((1, 2048), (16, 1024)), help="1x2048,16x1024")
    parser.add_argument("--profile", type=_sizes, default=(), help="batches of which a step is taken apart")
    arguments = parser.parse_args(argv)
    result: dict[str, Any] = {"case": arguments.case, "layers": arguments.layers}
    broken = ""
    if torch.device(arguments.device).type == "cpu":
        torch.set_num_threads(1)
    try:
        with opened(arguments) as bench:
            result |= {"device": bench.device_name, "phases": bench.phases.seconds, "imports_s": bench.begun_s}
            result |= {"ready_s": bench.begun_s + bench.phases.total_s, "decode": [], "prefill": [], "profile": []}
            for batch in arguments.batches:
                result["decode"].append(_shown(bench.decode(batch)))
            for num, tokens in arguments.prefill:
                result["prefill"].append(_shown(bench.prefill(num, tokens)))
            for made in bench.profile(arguments.profile) if arguments.profile else ():
                print("\n".join(table(made)), flush=True)
                result["profile"].append(asdict(made) | {"gap_share": made.gap_share})
            if not bench.engine.books_balance:
                raise Broken("blocks or requests are left behind")
            if bench.device.type == "cuda":
                runner: Any = bench.engine.runner
                result["peak_gb"] = torch.cuda.max_memory_allocated(bench.device) / 1e9
                result["steps"] = {
                    "captured": runner.num_captures,
                    "replayed": runner.num_replays,
                    "eager": runner.num_eager,
                }
    except (Broken, ProfileError) as error:
        broken = str(error)
        print(f"BROKEN: {broken}", flush=True)
    print(json.dumps(result | {"broken": broken}), flush=True)
    return 1 if broken else 0


def _shown(found: Decode | Prefill) -> dict[str, Any]:
    """Printed for people, returned for JSON."""
    out = asdict(found)
    if isinstance(found, Decode):
        floor = f", {found.times_floor:.2f} x floor {found.floor_ms:.2f}" if found.times_floor else ""
        experts = f", {found.distinct_experts:.1f} experts a layer" if found.distinct_experts else ""
        line = f"batch {found.batch}: {found.ms:.2f} ms ({found.tokens_per_s:,.0f} tok/s){floor}{experts}"
        print(f"{line}; p90 {found.ms_p90:.2f}, {found.num_steps} steps", flush=True)
        return out | {"times_floor": found.times_floor}
    size = f"{found.num_prompts} x {found.prompt_tokens}"
    print(f"prefill {size}: {found.ms:.1f} ms ({found.tokens_per_s:,.0f} tok/s)", flush=True)
    return out


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def _prompts(text: str) -> tuple[tuple[int, int], ...]:
    pairs = [part.split("x") for part in text.split(",") if part]
    return tuple((int(num), int(tokens)) for num, tokens in pairs)


if __name__ == "__main__":
    sys.exit(main())
