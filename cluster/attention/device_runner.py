"""Runs step batches on a GPU: one copy in, a captured graph or an eager forward, ids out; the host is a step ahead.

A step whose tokens are all decodes runs in a **bucket**, the size that its header names: tensors are padded to it and
lie at fixed addresses, so the whole step (embedding to drawn ids) is one CUDA graph. A bucket runs eagerly the first
time it is met and is captured the second time; of too many graphs the one used longest ago is dropped. No stream waits
for either where a larger bucket can do: one rank alone replays that for a while. Most is captured when nobody waits at
all (`warm_up.py`): `prepare` has the other forms of a bucket's attention captured too, one a step. Small steps with
prompts in them have buckets too and are graphs between their attentions (`prompt_graphs.py`); larger ones are eager:
their work hides their launches. What a graph holds is its key: bucket, form of the attention plan, and what the step
says of experts and exchange. Where that changes, after an epoch or with a new pool of experts, steps run at once,
eagerly, and are captured again. What an eager step may allocate is the allocator's from the first step on, and pinned
memory is what the largest step needs: no step waits for the driver's memory (two pinned pieces took 20 ms).

Nothing waits inside a step. Ids are drawn on the device and copied to pinned memory behind it; `collect` waits for that
copy alone. Idea: vLLM's full CUDA graphs and asynchronous scheduling."""

import logging
from collections import OrderedDict, deque
from collections.abc import Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch

from ...checkpoint import Checkpoint, ProgressCallback
from ...config import CacheConfig, SchedulerConfig
from ...errors import ExchangeError, StartupError
from ...router.contracts import StepContext
from ...router.device_step import DeviceStep
from ...startup_phases import StartupPhases
from ..sizing import activation_bytes, widened_kv_bytes
from .batch import ScheduledTokens, StepBatch, build
from .device_model import DeviceBatch, DeviceModel, Rows
from .device_sampler import DeviceSampler, decode_flags
from .flash import FlashAttention
from .flash_torch import TorchAttention, select_attention
from .prompt_graphs import MOST_TOKENS, PromptGraphs, bucket_of
from .runner import (
    Flight,
    Landed,
    StepResult,
    attention_weight_bytes,
    kv_dtype_of,
    size_kv_pool,
    tokenizer_vocab_size,
    warn_of_cut_keys,
)
from .sampler import Sampled, Sampler
from .sequence import UNSEEN, Sequence
from .stage import Fetched, Inputs, Stage
from .weights import fp8_parameters

_log = logging.getLogger(__name__)
MAX_GRAPHS = 128
PATIENCE = 500  # steps of a bucket that a larger one takes before it is captured beside streams
_SPARE_BYTES = 512 << 20  # of the GPU: what graphs made ahead leave to those that a step needs
_NUM_STAGES = 3  # pinned inputs and outputs: two steps in flight and one being made
_MEMORY_SHARE = 0.96  # of the GPU; the rest is the allocator's and the driver's


class DeviceRunner:
    """Engine thread only; all work goes to that thread's current stream."""

    runs_ahead = True

    def __init__(
        self,
        model: DeviceModel,
        attention: FlashAttention | TorchAttention,
        *,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        max_num_seqs: int,
        max_num_tokens: int = 0,
        step_bytes: int = 0,
    ) -> None:
        """`max_num_tokens`: of the largest step; `step_bytes`: what it may allocate; the allocator gets it before the
        first one."""
        self.model, self.attention = model, attention
        self.num_blocks, self.block_size, self.vocab_size = num_blocks, block_size, vocab_size
        self.device = model.device
        self.kv_pages = model.new_kv_cache(num_blocks)
        self.host_sampler = Sampler(vocab_size)
        self.device_sampler = DeviceSampler(vocab_size, max_num_seqs, self.device)
        self.num_captures = self.num_replays = self.num_eager = 0
        self._slots: dict[str, int] = {}  # by request
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._current: set[str] = set()  # requests whose state on the device is the host's, or ahead of it
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._met: set[Hashable] = set()  # buckets, of a step's key, that have run eagerly
        self._patience: dict[Hashable, int] = {}  # steps that a larger bucket took, by the key of their own
        self._preparing = False
        self._is_usual = True  # the step being launched runs as others of its kind do
        self._pool = torch.cuda.graph_pool_handle()
        self._capturing = torch.cuda.Stream(self.device)
        self._max_num_seqs = max_num_seqs
        self._inputs = Inputs(max_num_seqs, self.device)
        self.prompt_graphs: PromptGraphs | None = None
        if isinstance(attention, FlashAttention):
            self._prompt_inputs = Inputs(max(max_num_seqs, MOST_TOKENS), self.device)
            self.prompt_graphs = PromptGraphs(model, self.kv_pages, attention, pool=self._pool, stream=self._capturing)
        self._bytes_to_reserve = step_bytes
        num_words = max(self._inputs.size, self._prompt_inputs.size if self.prompt_graphs else 0, 3 * max_num_tokens)
        self._stages = deque(Stage(8 * (num_words + 2 * max_num_seqs), max_num_seqs) for _ in range(_NUM_STAGES))
        if isinstance(attention, FlashAttention):
            attention.reserve(max_num_tokens)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        cache: CacheConfig,
        scheduler: SchedulerConfig,
        *,
        device: torch.device | str,
        max_model_len: int,
        expert_bytes: int = 0,
        vocab_size: int = 0,
        batch_invariant: bool = False,
        progress: ProgressCallback | None = None,
        phases: StartupPhases | None = None,
    ) -> "DeviceRunner":
        """Load this tier's weights, and make a KV pool of the memory that is left beside `expert_bytes` (what the
        experts of this process will take) and a step's activations.

        Raises StartupError, with the numbers, before anything is loaded where it cannot fit."""
        config = checkpoint.config
        weight_bytes = attention_weight_bytes(config, torch.bfloat16) - fp8_parameters(checkpoint)
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        usable = free_bytes - int((1 - _MEMORY_SHARE) * total_bytes)
        step_bytes = activation_bytes(config, scheduler.max_num_batched_tokens, scheduler.max_num_seqs)
        graph_bytes = activation_bytes(config, min(MOST_TOKENS, scheduler.max_num_batched_tokens), 0)
        kv_dtype, max_num_blocks = kv_dtype_of(cache, torch.bfloat16), -(-max_model_len // cache.block_size)
        if kv_dtype != torch.bfloat16:
            graph_bytes += widened_kv_bytes(config, max_num_blocks * cache.block_size)
        available = usable - expert_bytes - step_bytes - graph_bytes
        if available <= weight_bytes:
            raise StartupError(
                f"this replica needs {_gib(weight_bytes)} of attention weights, {_gib(expert_bytes)} of experts and "
                f"{_gib(step_bytes + graph_bytes)} for a step of {scheduler.max_num_batched_tokens} tokens; "
                f"{_gib(usable)} of {_gib(total_bytes)} on the GPU can be used: more shards, a quantised checkpoint or "
                "a smaller scheduler.max_num_batched_tokens (`expertmesh plan` does this arithmetic)"
            )
        if not cache.num_blocks:
            cache = replace(cache, kv_memory_bytes=available - weight_bytes)
        num_blocks = size_kv_pool(
            config, cache, kv_dtype=kv_dtype, weight_bytes=weight_bytes, available_bytes=available
        )
        phases = phases or StartupPhases()
        with phases.phase("weights"):
            model = DeviceModel.load(
                checkpoint,
                device=device,
                max_model_len=max_model_len,
                block_size=cache.block_size,
                kv_dtype=kv_dtype,
                batch_invariant=batch_invariant,
                progress=progress,
            )
        warn_of_cut_keys(model.weights, config, kv_dtype)
        attention = select_attention(
            "auto",
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            cache.block_size,
            device,
            kv_dtype=kv_dtype,
            max_num_reqs=scheduler.max_num_seqs,
            max_num_blocks=max_num_blocks,
            invariant=batch_invariant,
        )
        with phases.phase("kv"):
            runner = cls(
                model,
                attention,
                num_blocks=num_blocks,
                block_size=cache.block_size,
                vocab_size=vocab_size or tokenizer_vocab_size(checkpoint),
                max_num_seqs=scheduler.max_num_seqs,
                max_num_tokens=scheduler.max_num_batched_tokens,
                step_bytes=step_bytes,
            )
            if isinstance(attention, FlashAttention):
                attention.load(*runner.kv_pages[0])
        return runner

    # -- what the engine calls

    def build(self, scheduled: Seq[ScheduledTokens]) -> StepBatch:
        """On the host: a launch copies what it needs."""
        return build(scheduled, block_size=self.block_size)

    def launch(self, batch: StepBatch, scheduled: Seq[ScheduledTokens], step: StepContext) -> Flight:
        assert isinstance(step, DeviceStep), "a mesh of GPU members gives device steps"
        started, self._is_usual = perf_counter(), True
        self._reserve()
        samplers = [item.sequence for item in scheduled if item.samples]
        token_ids = self._token_ids(batch, scheduled)
        if any(self.device_sampler.needs_host(sequence) for sequence in samplers):
            return self._sample_on_host(batch, token_ids, samplers, step, started)
        slots = self._admitted_slots(samplers)
        stage = self._next_stage()
        stage.begin()
        bucket = step.header.bucket if self.attention.capturable else 0
        if 0 < bucket <= self._max_num_seqs and batch.num_tokens == batch.num_reqs == len(samplers):
            ids, flags = self._run_bucket(bucket, batch, token_ids, slots, step, stage)
        elif self.prompt_graphs and step.graph_key is not None and (own := bucket_of(batch.num_tokens, bucket)):
            logits = self._run_prompts(self.prompt_graphs, own, batch, token_ids, slots, step, stage)
            ids, flags = self.device_sampler.sample(logits, self._prompt_inputs.slots[: len(slots)])
        else:
            self.num_eager += 1
            logits = self._forward(batch, token_ids, step, stage)
            ids, flags = self.device_sampler.sample(logits, stage.send(slots, self.device))
        return _DeviceFlight(self, step, stage.fetch(ids, flags, len(samplers)), started, is_usual=self._is_usual)

    def serve(self, step: StepContext) -> Flight:
        assert isinstance(step, DeviceStep), "a mesh of GPU members gives device steps"
        started = perf_counter()
        step.take_turns()
        nothing = torch.empty(0, dtype=torch.int64, device=self.device)
        fetched = self._next_stage().fetch(nothing, nothing.to(torch.uint8), 0)
        return _DeviceFlight(self, step, fetched, started, serves=True)

    def needs_host(self, sequence: Sequence) -> bool:
        return self.device_sampler.needs_host(sequence)

    def release(self, sequence: Sequence) -> None:
        slot = self._slots.pop(sequence.request_id, None)
        self._current.discard(sequence.request_id)
        if slot is not None:
            self.device_sampler.release(slot)
            self._free_slots.append(slot)

    def prepare(self, on: bool) -> None:
        """From now on (any thread) steps of decodes have other forms of their bucket captured, one a step."""
        self._preparing = on

    def forget_drawn(self) -> None:
        """What the device has drawn is void: every sequence's state is sent again."""
        self._current.clear()

    def warm_up(self, rows: Rows, num_tokens: int) -> None:
        """Load every kernel of a step of `num_tokens` new tokens of one request, writing to no KV."""
        batch = DeviceBatch(
            token_ids=torch.zeros(num_tokens, dtype=torch.int64, device=self.device),
            positions=torch.arange(num_tokens, device=self.device),
            slot_mapping=torch.full((num_tokens,), -1, dtype=torch.int64, device=self.device),
            logits_rows=torch.zeros(1, dtype=torch.int64, device=self.device),
        )
        blocks = np.zeros((1, -(-num_tokens // self.block_size)), np.int32)
        self.attention.plan(np.array([num_tokens], np.int32), np.array([num_tokens], np.int32), blocks)
        logits = self.model.forward(batch, self.kv_pages, rows, self.attention)
        self.device_sampler.sample(logits, torch.full((1,), -1, dtype=torch.int32, device=self.device))
        torch.cuda.synchronize(self.device)

    # -- a step

    def _reserve(self) -> None:
        """Once, when the experts of this process have their memory: a block that the allocator keeps and cuts up."""
        num_bytes, self._bytes_to_reserve = self._bytes_to_reserve, 0
        if not num_bytes:
            return
        try:
            torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            free_bytes, _ = torch.cuda.mem_get_info(self.device)
            _log.warning(
                "%s for the largest step cannot be set aside, %s of the GPU are free: such a step may find no memory; "
                "lower cache.kv_memory_bytes or scheduler.max_num_batched_tokens",
                _gib(num_bytes),
                _gib(free_bytes),
            )

    def _token_ids(self, batch: StepBatch, scheduled: Seq[ScheduledTokens]) -> np.ndarray:
        """[T] int64, with -1 - slot for a token that only the device knows."""
        token_ids = batch.token_ids.numpy()
        unseen = (token_ids == UNSEEN).nonzero()[0]
        if len(unseen):
            rows = np.searchsorted(batch.cu_seqlens_q.numpy(), unseen, side="right") - 1
            token_ids = token_ids.copy()
            token_ids[unseen] = [-1 - self._slots[scheduled[row].sequence.request_id] for row in rows.tolist()]
        return token_ids

    def _admitted_slots(self, samplers: Seq[Sequence]) -> np.ndarray:
        """[S] int32; sequences that the device does not know, or not any more, are sent to it."""
        slots = np.empty(len(samplers), np.int32)
        for row, sequence in enumerate(samplers):
            name = sequence.request_id
            slot = self._slots.get(name)
            if slot is None:
                slot = self._slots[name] = self._free_slots.pop()
            if name not in self._current:
                self.device_sampler.admit(slot, sequence)
                self._current.add(name)
            slots[row] = slot
        self.device_sampler.upload()
        return slots

    def _run_bucket(
        self,
        bucket: int,
        batch: StepBatch,
        token_ids: np.ndarray,
        slots: np.ndarray,
        step: DeviceStep,
        stage: Stage,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens are decodes that sample. -> ids, flags [bucket] on the device."""
        assert isinstance(self.attention, FlashAttention)
        stage.fill(self._inputs, batch, token_ids, slots)
        key = self._plan_bucket(bucket, batch, step)
        captured = self._graphs.get(key)
        if captured is None and key is not None:
            captured = self._larger(key, bucket, batch, step)
            if captured is None and (bucket, step.graph_key) in self._met:
                self._plan_bucket(bucket, batch, step)
                captured = self._capture(key, bucket, step)
        elif captured is not None and self._preparing and sum(step.header.num_tokens) == batch.num_tokens:
            self._capture_other_form(bucket, batch, step)
        if captured is None:
            if key is not None:
                self._met.add((bucket, step.graph_key))
                self._is_usual = False
                self._plan_bucket(bucket, batch, step)
            self.num_eager += 1
            return self._decode(bucket, step)
        captured.graph.replay()
        step.replayed()
        self.num_replays += 1
        return captured.ids, captured.flags

    def _plan_bucket(self, bucket: int, batch: StepBatch, step: DeviceStep, form: str | None = None) -> Hashable | None:
        """Plan the step's attention -> the key of its graph; None = not to be captured."""
        assert isinstance(self.attention, FlashAttention)
        lens, table = (batch.q_lens.numpy(), batch.seq_lens.numpy()), batch.block_table.numpy()
        found = self.attention.plan(*lens, table, bucket=bucket, form=form)
        if step.graph_key is None:
            return None
        key = (found, step.graph_key)
        if key in self._graphs:
            self._graphs.move_to_end(key)
        return key

    def _larger(self, key: Hashable, bucket: int, batch: StepBatch, step: DeviceStep) -> "_Captured | None":
        """A captured step of a larger bucket, planned for: as good, but for its padding. Where there are other ranks
        none has the key, which names the rows that they all exchange."""
        taken = self._patience.get(key, 0)
        if taken >= PATIENCE or self._preparing:
            return None
        for size in sorted({graph.bucket for graph in self._graphs.values() if graph.bucket > bucket})[:2]:
            if found := self._graphs.get(self._plan_bucket(size, batch, step)):
                self._patience[key] = taken + 1
                return found
        return None

    def _capture_other_form(self, bucket: int, batch: StepBatch, step: DeviceStep) -> None:
        """One that longer contexts will need, where the driver has memory for it; no more, for an exchange counts a
        step's first turn once."""
        if torch.cuda.mem_get_info(self.device)[0] < _SPARE_BYTES:
            return
        assert isinstance(self.attention, FlashAttention)
        for form in self.attention.forms(bucket):
            key = self._plan_bucket(bucket, batch, step, form)
            if key not in self._graphs:
                self._capture(key, bucket, step)
                break
        self._plan_bucket(bucket, batch, step)

    def _decode(self, bucket: int, step: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """From fixed inputs to drawn ids."""
        batch = self._inputs.batch(bucket)
        last_token = self.device_sampler.last_token
        logits = self.model.forward(batch, self.kv_pages, step, self.attention, last_token=last_token)
        return self.device_sampler.sample(logits, self._inputs.slots[:bucket])

    def _capture(self, key: Hashable, bucket: int, step: DeviceStep) -> "_Captured":
        """Thread-local mode: other threads load experts meanwhile, which allocates."""
        graph = torch.cuda.CUDAGraph()
        self._capturing.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._capturing):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                ids, flags = self._decode(bucket, step)
            finally:
                graph.capture_end()
        step.captured(graph)
        self.num_captures += 1
        self._is_usual = False
        self._patience.pop(key, None)
        captured = self._graphs[key] = _Captured(graph, bucket, ids, flags)
        while len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return captured

    def _run_prompts(
        self,
        graphs: PromptGraphs,
        bucket: int,
        batch: StepBatch,
        token_ids: np.ndarray,
        slots: np.ndarray,
        step: DeviceStep,
        stage: Stage,
    ) -> torch.Tensor:
        """Any lengths, up to `bucket` tokens -> logits [S, vocab]."""
        inputs = self._prompt_inputs
        stage.fill(inputs, batch, token_ids, slots)
        rows = stage.send(batch.logits_rows.numpy(), self.device)
        self.attention.plan(batch.q_lens.numpy(), batch.seq_lens.numpy(), batch.block_table.numpy())
        last_token = self.device_sampler.last_token
        captures = graphs.num_captures
        x, replayed = graphs.run(inputs.batch(bucket), batch.num_tokens, step, last_token)
        self.num_eager += not replayed
        self._is_usual = replayed and graphs.num_captures == captures
        return self.model.logits(x, rows, bucket)

    def _forward(self, batch: StepBatch, token_ids: np.ndarray, step: DeviceStep, stage: Stage) -> torch.Tensor:
        """Eager, any lengths -> logits [S, vocab]."""
        num_tokens, num_rows = batch.num_tokens, batch.logits_rows.shape[0]
        sent = stage.send(
            np.concatenate([token_ids, batch.positions.numpy(), batch.slot_mapping.numpy(), batch.logits_rows.numpy()]),
            self.device,
        )
        token_ids_, positions, slot_mapping, rows = sent.split([num_tokens, num_tokens, num_tokens, num_rows])
        self.attention.plan(batch.q_lens.numpy(), batch.seq_lens.numpy(), batch.block_table.numpy())
        device_batch = DeviceBatch(
            token_ids=token_ids_, positions=positions, slot_mapping=slot_mapping, logits_rows=rows
        )
        last_token = self.device_sampler.last_token
        return self.model.forward(device_batch, self.kv_pages, step, self.attention, last_token=last_token)

    def _sample_on_host(
        self, batch: StepBatch, token_ids: np.ndarray, samplers: Seq[Sequence], step: DeviceStep, started: float
    ) -> Flight:
        """Something in this step looks at text or at its own tokens: `sampler.py` draws, as on a CPU."""
        self.num_eager += 1
        stage = self._next_stage()
        logits = self._forward(batch, token_ids, step, stage)
        event = torch.cuda.Event()
        event.record()
        step.wait(event)
        step.finish()
        computed = perf_counter()
        sampled = self.host_sampler.sample(logits.float(), samplers)
        self._current.difference_update(sequence.request_id for sequence in samplers)
        return Landed(StepResult(sampled, computed - started, perf_counter() - computed))

    def _next_stage(self) -> Stage:
        self._stages.rotate(-1)
        self._stages[0].wait_until_free()
        return self._stages[0]


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    bucket: int
    ids: torch.Tensor  # [bucket] int64, where its replays write
    flags: torch.Tensor  # [bucket] uint8


class _DeviceFlight:
    """A step on the device."""

    __slots__ = ("_fetched", "_is_usual", "_runner", "_serves", "_started", "_step")

    def __init__(
        self,
        runner: DeviceRunner,
        step: DeviceStep,
        fetched: Fetched,
        started: float,
        *,
        is_usual: bool = False,
        serves: bool = False,
    ) -> None:
        self._runner, self._step, self._fetched, self._started = runner, step, fetched, started
        self._is_usual, self._serves = is_usual, serves

    @property
    def is_over(self) -> bool:
        return self._step.is_over(self._fetched.arrived)

    def collect(self) -> StepResult | None:
        try:
            self._step.wait(self._fetched.arrived)
            self._step.finish()
        except ExchangeError:
            self._runner.forget_drawn()
            raise
        if self._serves:
            return None
        began, arrived = self._fetched.began, self._fetched.arrived
        step_s = 1e-3 * began.elapsed_time(arrived) if self._is_usual and began is not None else 0.0
        finite, forced = decode_flags(self._fetched.flags)
        ids = self._fetched.ids.tolist()
        nothing: list[None] = [None] * len(ids)
        return StepResult(Sampled(ids, forced, finite, [*nothing]), perf_counter() - self._started, 0.0, step_s)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"
