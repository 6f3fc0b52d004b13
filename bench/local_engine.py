"""A whole engine in one process: real model, real scheduler, real KV, a mesh of one. For benchmarks of the engine
itself and for tests that compare a busy engine's streams with solo runs."""

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch

from ..checkpoint import Checkpoint
from ..cluster.attention.engine import Engine, StepObserver
from ..cluster.attention.grammar import GrammarCompiler
from ..cluster.attention.load import load_runner
from ..cluster.attention.warm_up import WarmUp
from ..config import CacheConfig, SchedulerConfig
from ..experts.device_experts import NUM_SPARE
from ..experts.mlp import LocalExpertMLP
from ..experts.weights import expert_bytes_on_disk
from ..request import EngineRequest, FinishReason, RequestOutput
from ..router.exchange import RowShape
from ..router.heap import freeze_heap
from ..router.local_mesh import LocalMesh
from ..router.mesh import ClusterMesh
from ..router.placement import uniform
from ..startup_phases import StartupPhases


@dataclass(slots=True)
class Stream:
    """What one request gave; times are those of `time.perf_counter`."""

    submitted_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    num_cached_tokens: int = 0
    end: RequestOutput | None = None

    @property
    def time_to_first_token_s(self) -> float:
        return self.token_times_s[0] - self.submitted_s


class LocalEngine:
    """Use as a context manager; `run` submits requests together and returns their streams when all have ended."""

    def __init__(
        self,
        folder: str | Path | Checkpoint,
        *,
        cache: CacheConfig,
        scheduler: SchedulerConfig | None = None,
        batch_invariant: bool = True,
        observer: StepObserver | None = None,
        mesh: ClusterMesh | None = None,  # experts elsewhere
        device: torch.device | str = "cpu",  # a GPU: in bfloat16
        max_model_len: int = 0,  # 0 = the checkpoint's
        phases: StartupPhases | None = None,
    ) -> None:
        """`folder`: a checkpoint, or what `open_model` made."""
        scheduler, phases = scheduler or SchedulerConfig(), phases or StartupPhases()
        checkpoint = folder if isinstance(folder, Checkpoint) else Checkpoint(folder)
        config = checkpoint.config
        device = torch.device(device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        max_model_len = max_model_len or config.max_position_embeddings
        self._scheduler, self._max_model_len = scheduler, max_model_len
        runner = self.runner = load_runner(
            checkpoint,
            cache,
            scheduler,
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            batch_invariant=batch_invariant,
            expert_bytes=0 if mesh else _expert_bytes(checkpoint),
            phases=phases,
        )
        with phases.phase("experts"):
            self.mesh = mesh or _alone(checkpoint, scheduler, dtype, device)
        self._warm_up = WarmUp(self._take)
        self.engine = Engine(
            runner,
            self.mesh,
            scheduler=scheduler,
            publish=self._warm_up.publish,
            max_model_len=max_model_len,
            attention_parity=config.attention_parity_tokens,
            enable_prefix_cache=cache.enable_prefix_cache,
            observer=observer,
            grammars=GrammarCompiler.for_checkpoint(checkpoint.folder, runner.vocab_size),
        )
        self.mesh.start(self.engine.on_header)
        self.streams: dict[str, Stream] = {}
        self._num_steps = 0  # that published something
        self._changed = threading.Condition()

    def __enter__(self) -> "LocalEngine":
        self.engine.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.engine.stop()
        self.mesh.close()

    def warm_up(self) -> tuple[float, float]:
        """As a replica before it serves, and then in idle time; seconds of both."""
        seconds = self._warm_up.run(self.engine, self._scheduler, max_model_len=self._max_model_len)
        began = time.perf_counter()
        self._warm_up.rest(self.engine, self._scheduler, max_model_len=self._max_model_len)
        freeze_heap()
        return seconds, time.perf_counter() - began

    def submit(self, request: EngineRequest) -> Stream:
        stream = self.streams[request.request_id] = Stream(submitted_s=time.perf_counter())
        self.engine.submit(request)
        return stream

    def wait(self, request_ids: Iterable[str], timeout_s: float = 600.0) -> None:
        names = list(request_ids)
        with self._changed:
            if not self._changed.wait_for(lambda: all(self.streams[n].end for n in names), timeout_s):
                raise TimeoutError(f"not ended after {timeout_s} s: {[n for n in names if not self.streams[n].end]}")

    def wait_for_any(self, request_ids: Iterable[str], timeout_s: float = 600.0) -> list[str]:
        """Those of them that have ended; at least one."""
        names, ended = list(request_ids), list[str]()

        def found() -> bool:
            ended[:] = [n for n in names if self.streams[n].end]
            return bool(ended)

        with self._changed:
            if not self._changed.wait_for(found, timeout_s):
                raise TimeoutError(f"none of {len(names)} requests ended in {timeout_s} s")
        return ended

    def wait_for_step_after_now(self, timeout_s: float = 60.0) -> None:
        """Until tokens come out, or nothing runs any more."""
        with self._changed:
            seen = self._num_steps
            self._changed.wait_for(
                lambda: self._num_steps > seen or all(s.end for s in self.streams.values()), timeout_s
            )

    def run(self, requests: Sequence[EngineRequest], timeout_s: float = 600.0) -> list[Stream]:
        streams = [self.submit(request) for request in requests]
        self.wait([request.request_id for request in requests], timeout_s)
        return streams

    @property
    def books_balance(self) -> bool:
        """Every block is free and nothing is queued."""
        load = self.engine.load()
        return load.num_free_kv_blocks == load.num_kv_blocks and load.num_running == load.num_waiting == 0

    def _take(self, outputs: list[RequestOutput]) -> None:
        now = time.perf_counter()
        with self._changed:
            for output in outputs:
                stream = self.streams[output.request_id]
                stream.token_ids += output.token_ids
                stream.token_times_s += [now] * len(output.token_ids)
                stream.num_cached_tokens = max(stream.num_cached_tokens, output.num_cached_tokens)
                if output.finish_reason is not FinishReason.NONE:
                    stream.end = output
            self._num_steps += 1
            self._changed.notify_all()


def _alone(checkpoint: Checkpoint, scheduler: SchedulerConfig, dtype: torch.dtype, device: torch.device) -> LocalMesh:
    """A mesh of one, with all experts."""
    config = checkpoint.config
    placement = uniform(config.num_layers, config.num_experts, 1, moe_layers=config.moe_layer_ids)
    return LocalMesh(
        LocalExpertMLP(checkpoint, dtype=dtype, device=device) if config.num_experts else None,
        placement,
        RowShape(hidden_size=config.hidden_size, top_k=config.top_k, dtype=dtype, device=device),
        max_prefill_tokens_per_step=scheduler.max_prefill_tokens_per_step,
        buckets=scheduler.graph_buckets,
    )


def _expert_bytes(checkpoint: Checkpoint) -> int:
    model = checkpoint.config
    places = model.num_experts + NUM_SPARE
    return sum(places * expert_bytes_on_disk(checkpoint, layer_id) for layer_id in model.moe_layer_ids)
