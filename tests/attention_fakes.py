"""Small real counterparts of the engine's neighbours: a model whose output depends on every KV entry, a mesh of one.

`HashModel` writes (token, position) into paged KV and reads the whole context back through the block table, so a wrong
block, slot, position, length or a stale page changes the next token. `next_logits` is the same function of a plain list
of tokens: what any stream must equal, however it was batched, chunked, preempted or cached."""

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from expertmesh.cluster.attention.runner import Runner
from expertmesh.cluster.attention.sampler import is_simple
from expertmesh.cluster.attention.sequence import UNSEEN, Sequence
from expertmesh.errors import ExchangeError
from expertmesh.request import EngineRequest, FinishReason, RequestOutput, SamplingParams
from expertmesh.router.epoch import StepHeader

VOCAB = 97
_MODULUS = (1 << 31) - 1


def context_hash(token_ids, positions) -> int:
    state = 17
    for token, position in zip(token_ids, positions):
        state = (state * 31337 + 1009 * int(token) + 7 * int(position) + 3) % _MODULUS
    return state


def logits_of(state: int, vocab: int = VOCAB) -> np.ndarray:
    ids = np.arange(1, vocab + 1, dtype=np.int64)
    return ((state * ids * ids + ids * 7919) % 10007 / 1000.0).astype(np.float32)


def next_logits(token_ids, vocab: int = VOCAB) -> np.ndarray:
    return logits_of(context_hash(token_ids, range(len(token_ids))), vocab)


def greedy_stream(prompt, count: int, stop=frozenset()) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(next_logits(tokens).argmax()))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


class HashModel:
    """One "layer": KV pages hold tokens and positions; two turns of `step.moe`, one before and one after the write."""

    def __init__(self, block_size: int, vocab: int = VOCAB) -> None:
        self.block_size, self.vocab = block_size, vocab
        self.num_steps = 0
        self.poison: set[int] = set()  # last token ids whose row becomes NaN

    def new_kv_cache(self, num_blocks: int):
        shape = (num_blocks, self.block_size, 1, 1)
        return [(torch.full(shape, -5, dtype=torch.int64), torch.full(shape, -5, dtype=torch.int64))]

    def forward(self, batch, kv_cache, step) -> torch.Tensor:
        self.num_steps += 1
        tokens, positions = (page.view(-1) for page in kv_cache[0])
        rows = torch.zeros(batch.num_tokens, 1)
        step.moe(0, rows, None, None)
        tokens[batch.slot_mapping] = batch.token_ids
        step.moe(1, rows, None, None)
        positions[batch.slot_mapping] = batch.positions
        wanted = set(batch.logits_rows.tolist())
        out = []
        for request in range(batch.num_reqs):
            last = int(batch.cu_seqlens_q[request + 1]) - 1
            length = int(batch.seq_lens[request])
            assert int(batch.positions[last]) == length - 1
            if last not in wanted:
                continue
            index = torch.arange(length)
            slots = batch.block_table[request].long()[index // self.block_size] * self.block_size
            slots += index % self.block_size
            state = context_hash(tokens[slots].tolist(), positions[slots].tolist())
            row = torch.from_numpy(logits_of(state, self.vocab))
            out.append(row * torch.nan if int(batch.token_ids[last]) in self.poison else row)
        return torch.stack(out) if out else torch.empty(0, self.vocab)


class AheadRunner(Runner):
    """A runner that runs ahead as a GPU's does: it draws from what its own earlier steps drew, whether the engine has
    seen that or not, and tells later. An error of the exchange shows when the step is collected."""

    runs_ahead = True

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._known: dict[str, Sequence] = {}  # by request: what the device has of it
        self.num_in_flight = self.most_in_flight = 0

    def launch(self, batch, scheduled, step):
        known = [self._known_of(item.sequence) for item in scheduled]
        token_ids = batch.token_ids.clone()
        for item, sequence, row in zip(scheduled, known, batch.cu_seqlens_q[:-1].tolist(), strict=True):
            if int(token_ids[row]) == UNSEEN:
                assert item.num_tokens == 1
                token_ids[row] = int(sequence.token_ids[sequence.num_tokens - 1])
        assert int(token_ids.min()) >= 0
        flight = _Flight(self, [item.sequence.request_id for item in scheduled])
        samplers = [sequence for item, sequence in zip(scheduled, known) if item.samples]
        try:
            flight.landed = super().launch(replace(batch, token_ids=token_ids), _sampled_by(scheduled, known), step)
            drawn = flight.landed.result.sampled.token_ids
        except ExchangeError as error:
            flight.error, drawn = error, [0] * len(samplers)
        for sequence, token_id in zip(samplers, drawn, strict=True):
            sequence.expect()
            sequence.see(token_id)
        return flight

    def serve(self, step):
        flight = _Flight(self, [])
        flight.landed = super().serve(step)
        return flight

    def needs_host(self, sequence) -> bool:
        sampling = sequence.request.sampling
        return sequence.grammar is not None or not is_simple(replace(sampling, temperature=0.0))

    def release(self, sequence) -> None:
        self._known.pop(sequence.request_id, None)

    def forget(self, request_ids) -> None:
        for request_id in request_ids:
            self._known.pop(request_id, None)

    def _known_of(self, sequence: Sequence) -> Sequence:
        if sequence.request_id not in self._known:
            assert not sequence.num_unseen, "the device cannot know what only it has drawn"
            request = replace(sequence.request, output_ids=tuple(sequence.output_ids.tolist()))
            self._known[sequence.request_id] = Sequence.of(request, grammar=sequence.grammar)
        return self._known[sequence.request_id]


class _Flight:
    """Is over at the third look."""

    def __init__(self, runner: AheadRunner, request_ids: list[str]) -> None:
        self._runner, self._request_ids, self._looks = runner, request_ids, 0
        self.landed = self.error = None
        runner.num_in_flight += 1
        runner.most_in_flight = max(runner.most_in_flight, runner.num_in_flight)

    @property
    def is_over(self) -> bool:
        self._looks += 1
        return self._looks > 2

    def collect(self):
        self._runner.num_in_flight -= 1
        if self.error is not None:
            self._runner.forget(list(self._runner._known))  # what was drawn since is void
            raise self.error
        return self.landed.collect()


def _sampled_by(scheduled, known):
    return [replace(item, sequence=sequence) for item, sequence in zip(scheduled, known)]


class FakeStep:
    def __init__(self, header: StepHeader, fail_at: int | None) -> None:
        self.header, self._fail_at = header, fail_at
        self.exchange_s = self.expert_s = 0.0
        self.served = False
        self._turn = 0

    def moe(self, layer_id, x, topk_ids, topk_weights):
        assert x.shape[0] <= self.header.num_tokens[0]
        if self._fail_at == self._turn:
            raise ExchangeError("injected", ep_rank=0, layer_id=layer_id, step_id=self.header.step_id, epoch=1)
        self._turn += 1
        return x

    def serve(self) -> None:
        self.served = True

    def finish(self) -> None:
        pass


class FakeMesh:
    """A leader and its only member: answers each bid with a header at once, or when told (`manual`)."""

    rank = 0

    def __init__(self, *, max_prefill: int = 1 << 20, manual: bool = False) -> None:
        self.max_prefill, self.manual = max_prefill, manual
        self.on_header: Callable[[StepHeader], None] = lambda header: None
        self.bids: list[tuple[int, int]] = []
        self.changed = threading.Condition()
        self.steps: list[FakeStep] = []
        self.fail: Callable[[int], int | None] = lambda step_id: None  # step_id -> turn to fail at
        self.fail_enter: Callable[[int], bool] = lambda step_id: False
        self._step_id = 0

    def bid(self, num_decode_tokens: int, num_prefill_tokens: int, traceparent: str = "") -> None:
        with self.changed:
            self.bids.append((num_decode_tokens, num_prefill_tokens))
            self.changed.notify_all()
        if not self.manual and num_decode_tokens + num_prefill_tokens:
            self.issue(num_decode_tokens + min(self.max_prefill, num_prefill_tokens))

    def issue(self, num_tokens: int) -> None:
        self._step_id += 1
        self.on_header(StepHeader(step_id=self._step_id, epoch=1, placement_version=1, num_tokens=(num_tokens,)))

    def wait_for_bid(self, count: int, timeout_s: float = 20.0) -> tuple[int, int]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.bids) >= count, timeout_s), "no bid came"
            return self.bids[count - 1]

    def wait_until_bid(self, *wanted: tuple[int, int], timeout_s: float = 20.0) -> None:
        """Until one of these is the newest bid."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.bids[-1:] and self.bids[-1] in wanted, timeout_s), "no such bid"

    def wait_for_step(self, count: int, timeout_s: float = 20.0) -> None:
        """Until so many steps have begun; what is submitted afterwards is not part of them."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.steps) >= count, timeout_s), "no step came"

    def enter(self, header: StepHeader) -> FakeStep:
        if self.fail_enter(header.step_id):
            raise ExchangeError("no epoch", ep_rank=0, layer_id=-1, step_id=header.step_id, epoch=1)
        step = FakeStep(header, self.fail(header.step_id))
        with self.changed:
            self.steps.append(step)
            self.changed.notify_all()
        return step


class Collector:
    """`publish` of an engine; gathers whole streams."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.calls: list[list[RequestOutput]] = []
        self.tokens: dict[str, list[int]] = {}
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.finished: dict[str, RequestOutput] = {}

    def __call__(self, outputs: list[RequestOutput]) -> None:
        with self.changed:
            self.calls.append(outputs)
            for output in outputs:
                assert output.request_id not in self.finished, "output after the end"
                self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
                self.outputs.setdefault(output.request_id, []).append(output)
                if output.finish_reason is not FinishReason.NONE:
                    self.finished[output.request_id] = output
            self.changed.notify_all()

    def wait(self, *request_ids: str, timeout_s: float = 60.0) -> None:
        with self.changed:
            done = self.changed.wait_for(lambda: all(i in self.finished for i in request_ids), timeout_s)
            assert done, f"unfinished: {[i for i in request_ids if i not in self.finished]}"

    def wait_tokens(self, request_id: str, count: int, timeout_s: float = 60.0) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.tokens.get(request_id, ())) >= count, timeout_s)


def request(request_id: str, prompt, **fields) -> EngineRequest:
    """Fields of EngineRequest by name; every other name is a sampling parameter."""
    own = {name: fields.pop(name) for name in ("output_ids", "thinking", "deadline", "prefix_salt") if name in fields}
    sampling = SamplingParams(**fields)
    return EngineRequest(request_id=request_id, prompt_ids=tuple(prompt), sampling=sampling, **own)
