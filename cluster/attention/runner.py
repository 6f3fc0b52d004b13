"""Runs one step batch on this device: owns the model's weights and the KV pages, sizes the pages, samples.

A failed step leaves nothing behind that matters: KV is written by slot, so running the same batch again writes the same
values, and the draw depends on seed and position alone."""

import json
import logging
import os
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Protocol

import torch

from ...checkpoint import Checkpoint, ProgressCallback
from ...config import CacheConfig
from ...errors import CheckpointError, StartupError
from ...kernels.kv_numbers import E4M3, E4M3_MAX
from ...model_config import ModelConfig
from ...router.contracts import StepContext
from ...router.device_step import DeviceStep
from ...startup_phases import StartupPhases
from ..sizing import attention_parameters
from .batch import ScheduledTokens, StepBatch, build
from .model import Model
from .rope import inverse_frequencies
from .sampler import Sampled, Sampler
from .sequence import Sequence
from .weights import AttentionWeights

KVPages = Seq[tuple[torch.Tensor, torch.Tensor]]  # per layer K, V [num_blocks, block_size, num_kv_heads, head_dim]

_log = logging.getLogger(__name__)
_GPU_MEMORY_SHARE = 0.85  # of the free memory, for weights and KV


class TokenModel(Protocol):
    """What a runner needs of a model; `model.Model` is the real one."""

    def new_kv_cache(self, num_blocks: int) -> KVPages: ...

    def forward(self, batch: StepBatch, kv_cache: KVPages, step: StepContext) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """Row i of `sampled` belongs to the i-th scheduled item that samples. `step_s`: all of it by the device's clock, 0
    = not known, or not as other steps of its kind are (a graph was captured)."""

    sampled: Sampled
    forward_s: float  # exchange and own expert work included
    sample_s: float
    step_s: float = 0.0


class Flight(Protocol):
    """A launched step."""

    @property
    def is_over(self) -> bool:
        """`collect` would not wait."""
        ...

    def collect(self) -> StepResult | None:
        """Wait for the step; None where this rank only served. An ExchangeError says that the step is void."""
        ...


@dataclass(frozen=True, slots=True)
class Landed:
    """A step that was over when it was launched, as on a CPU."""

    result: StepResult | None
    is_over: bool = True

    def collect(self) -> StepResult | None:
        return self.result


class StepRunner(Protocol):
    """What an engine runs its batches with: `Runner` here, `DeviceRunner` on a GPU. Engine thread only."""

    runs_ahead: bool  # whether a step may be launched before the one before it is collected
    num_blocks: int
    block_size: int
    vocab_size: int

    def build(self, scheduled: Seq[ScheduledTokens]) -> StepBatch: ...

    def launch(self, batch: StepBatch, scheduled: Seq[ScheduledTokens], step: StepContext) -> Flight:
        """Forward and sample. After an ExchangeError, here or in `collect`, the same call may be made again."""
        ...

    def serve(self, step: StepContext) -> Flight:
        """A step in which this rank has no tokens."""
        ...

    def needs_host(self, sequence: Sequence) -> bool:
        """What this sequence's next token may be depends on what the host knows of the last: no running ahead."""
        ...

    def release(self, sequence: Sequence) -> None:
        """The sequence has ended: forget what is kept for it."""
        ...

    def prepare(self, on: bool) -> None:
        """Nobody waits for these steps: may what later ones need be made in them? From any thread."""
        ...


class Runner:
    """Plain torch on any device, each step over when it is launched."""

    runs_ahead = False

    def __init__(
        self,
        model: TokenModel,
        *,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model = model
        self.num_blocks, self.block_size, self.vocab_size, self.device = num_blocks, block_size, vocab_size, device
        self.kv_pages = model.new_kv_cache(num_blocks)
        self.sampler = Sampler(vocab_size)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        cache: CacheConfig,
        *,
        vocab_size: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        batch_invariant: bool = True,
        progress: ProgressCallback | None = None,
        phases: StartupPhases | None = None,
    ) -> "Runner":
        """Load this tier's weights and make the KV pool. `vocab_size` = ids that may be sampled, 0 = those that the
        checkpoint's tokenizer knows.

        Raises StartupError, with the numbers, before anything is loaded where it cannot fit."""
        weight_bytes = attention_weight_bytes(checkpoint.config, dtype)
        kv_dtype = kv_dtype_of(cache, dtype)
        available_bytes = available_memory(device)
        if torch.device(device).type == "cuda" and not cache.num_blocks and available_bytes is not None:
            free = int(_GPU_MEMORY_SHARE * available_bytes) - weight_bytes  # the rest is for activations
            cache = replace(cache, kv_memory_bytes=max(0, free))
        num_blocks = size_kv_pool(
            checkpoint.config, cache, kv_dtype=kv_dtype, weight_bytes=weight_bytes, available_bytes=available_bytes
        )
        phases = phases or StartupPhases()
        with phases.phase("weights"):
            model = Model.load(
                checkpoint,
                dtype=dtype,
                device=device,
                block_size=cache.block_size,
                kv_dtype=kv_dtype,
                batch_invariant=batch_invariant,
                progress=progress,
            )
        warn_of_cut_keys(model.weights, checkpoint.config, kv_dtype)
        with phases.phase("kv"):
            return cls(
                model,
                num_blocks=num_blocks,
                block_size=cache.block_size,
                vocab_size=vocab_size or tokenizer_vocab_size(checkpoint),
                device=device,
            )

    def build(self, scheduled: Seq[ScheduledTokens]) -> StepBatch:
        return build(scheduled, block_size=self.block_size, device=self.device)

    def launch(self, batch: StepBatch, scheduled: Seq[ScheduledTokens], step: StepContext) -> Flight:
        started = perf_counter()
        logits = self.model.forward(batch, self.kv_pages, step)
        if isinstance(step, DeviceStep):  # plain torch on a GPU: what went wrong is known when it is over
            step.settle()
        computed = perf_counter()
        sampled = self.sampler.sample(logits, [item.sequence for item in scheduled if item.samples])
        step.finish()
        return Landed(StepResult(sampled, computed - started, perf_counter() - computed))

    def serve(self, step: StepContext) -> Flight:
        step.serve()
        return Landed(None)

    def needs_host(self, sequence: Sequence) -> bool:
        return True

    def release(self, sequence: Sequence) -> None:
        pass

    def prepare(self, on: bool) -> None:
        pass


def tokenizer_vocab_size(checkpoint: Checkpoint) -> int:
    """Ids that the tokenizer knows; those beyond are padding of the embedding. Without a tokenizer, the model's."""
    path, most = checkpoint.folder / "tokenizer.json", checkpoint.config.vocab_size
    if not path.is_file():
        return most
    try:
        tokenizer = json.loads(path.read_bytes())
        ids = [*tokenizer["model"]["vocab"].values(), *(t["id"] for t in tokenizer.get("added_tokens", ()))]
        return min(int(max(ids)) + 1, most)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"not a readable tokenizer: {error}; download the file again", file=str(path)) from error


def attention_weight_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the attention tier's weights: everything but the experts."""
    return attention_parameters(config) * dtype.itemsize


def kv_dtype_of(cache: CacheConfig, dtype: torch.dtype) -> torch.dtype:
    """What KV is stored as beside weights of `dtype`."""
    return {"auto": dtype, "bf16": torch.bfloat16, "fp8": E4M3}[cache.kv_dtype]


def warn_of_cut_keys(weights: AttentionWeights, config: ModelConfig, kv_dtype: torch.dtype) -> None:
    """e4m3 ends at 448. A normed key is at most sqrt(head_dim) long before its weight, so its norm's weights say where
    keys could be cut; values have no such bound, and are small."""
    if kv_dtype != E4M3:
        return
    _, factor = inverse_frequencies(config.rope, config.head_dim)
    most = [float(layer.qk_norm[config.num_heads :].abs().max()) for layer in weights.layers]
    longest = factor * config.head_dim**0.5 * max(most)
    if longest > E4M3_MAX:
        _log.warning(
            "keys of layer %d may reach %.0f, and fp8 KV cuts them at %.0f: compare answers with cache.kv_dtype=bf16",
            most.index(max(most)),
            longest,
            E4M3_MAX,
        )


def size_kv_pool(
    config: ModelConfig, cache: CacheConfig, *, kv_dtype: torch.dtype, weight_bytes: int, available_bytes: int | None
) -> int:
    """Number of KV blocks: as configured, or what kv_memory_bytes holds; refused where the memory is not there."""
    block_bytes = cache.block_size * config.kv_bytes_per_token(kv_dtype.itemsize)
    num_blocks = cache.num_blocks or cache.kv_memory_bytes // block_bytes
    if num_blocks < 2:
        raise StartupError(
            f"the KV pool of {_mib(cache.kv_memory_bytes)} holds {num_blocks} blocks of {cache.block_size} tokens "
            f"({_mib(block_bytes)} each); raise cache.kv_memory_bytes to at least {2 * block_bytes}"
        )
    kv_bytes = num_blocks * block_bytes
    needed = weight_bytes + kv_bytes
    if available_bytes is not None and needed > available_bytes:
        raise StartupError(
            f"this attention replica needs {_mib(needed)}: {_mib(weight_bytes)} of weights and {_mib(kv_bytes)} of KV "
            f"({num_blocks} blocks); {_mib(available_bytes)} are available; lower cache.kv_memory_bytes or "
            "cache.num_blocks, set cache.kv_dtype=fp8, or use a larger machine (`expertmesh plan` says which)"
        )
    return num_blocks


def available_memory(device: torch.device | str) -> int | None:
    """Free bytes on the device; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (OSError, ValueError):
        return None


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.1f} MiB"
