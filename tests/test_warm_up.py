"""Before a replica serves: its own requests run the whole path, cost no client anything, and leave nothing behind."""

import threading
from dataclasses import replace

import pytest

from expertmesh.bench.fake_engine import FakeEngine
from expertmesh.bench.local_engine import LocalEngine
from expertmesh.cluster.attention import warm_up
from expertmesh.cluster.attention.step_stats import StepStats
from expertmesh.cluster.attention.warm_up import STEPS, STEPS_REST, Round, WarmUp, lessons, rounds
from expertmesh.config import CacheConfig, SchedulerConfig
from expertmesh.errors import KVCacheExhausted
from expertmesh.kernels import compile_ahead, jit
from expertmesh.kernels.grouped_gemm import gemm_kernel
from expertmesh.kernels.grouped_gemm_mma import choose_mma_plan, mma_kernel
from expertmesh.kernels.permute import route_and_pack_pairs_kernel
from expertmesh.kernels.plan import choose_plan
from expertmesh.request import EngineRequest, FinishReason, RequestOutput, SamplingParams
from expertmesh.router.leader import PROMPT_BUCKETS

UP_TO_1024 = [Round(size) for size in PROMPT_BUCKETS if size <= 1024 for _ in range(2)]


@pytest.mark.parametrize(
    ("batched", "prefill", "num_seqs", "length", "expected"),
    [
        (16384, 16384, 256, 4096, [Round(size) for size in PROMPT_BUCKETS for _ in range(2)]),
        (2048, 1024, 256, 40960, [*UP_TO_1024, *2 * [Round(1024, 1)], *2 * [Round(1024, 129)]]),
        (2048, 1024, 33, 40960, [*UP_TO_1024, *2 * [Round(1024, 1)]]),
        (1100, 1024, 256, 40960, [*UP_TO_1024, *2 * [Round(1024, 1)]]),
        (512, 400, 256, 64, [Round(size) for size in (16, 16, 32, 32, 61, 61)]),
    ],
    ids=str,
)
def test_each_bucket_is_met_twice_the_largest_by_a_whole_step_beside_decodes(
    batched: int, prefill: int, num_seqs: int, length: int, expected: list[Round]
):
    scheduler = SchedulerConfig(
        max_num_batched_tokens=batched, max_prefill_tokens_per_step=prefill, max_num_seqs=num_seqs
    )
    assert list(rounds(scheduler, length)) == expected


def test_decodes_beside_the_longest_prompt_fill_the_buckets_above_it(tiny_checkpoint):
    steps: list[tuple[int, int]] = []  # decodes, tokens of prompts

    class Observer:
        def observe(self, stats: StepStats) -> None:
            steps.append((stats.num_decode_tokens, stats.num_prefill_tokens))

    scheduler = SchedulerConfig(max_num_batched_tokens=100, max_prefill_tokens_per_step=30, max_num_seqs=40)
    cache = CacheConfig(kv_memory_bytes=4 << 20)
    local = LocalEngine(tiny_checkpoint, cache=cache, scheduler=scheduler, observer=Observer(), max_model_len=90)
    with local:
        local.warm_up()
        assert local.books_balance
        assert local.streams == {}
    beside = [decodes for decodes, tokens in steps if tokens == 30]
    assert [beside.count(num_decodes) for num_decodes in (1, 3, 35)] == [2, 2, 2]


def test_each_bucket_of_decodes_is_gone_through_powers_of_two_before_others_are_served(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(warm_up, "BOUND_S", 60.0)
    steps: list[tuple[int, int]] = []  # decodes, tokens of prompts

    class Observer:
        def observe(self, stats: StepStats) -> None:
            steps.append((stats.num_decode_tokens, stats.num_prefill_tokens))

    scheduler = SchedulerConfig(max_num_batched_tokens=64, max_prefill_tokens_per_step=32, max_num_seqs=13)
    assert scheduler.graph_buckets == (1, 2, 4, 8, 12, 13)
    cache = CacheConfig(kv_memory_bytes=4 << 20)
    local = LocalEngine(tiny_checkpoint, cache=cache, scheduler=scheduler, observer=Observer(), max_model_len=90)
    with local:
        local._warm_up.run(local.engine, scheduler, max_model_len=90)
        before = [decodes for decodes, tokens in steps if not tokens]
        assert {size for size in range(1, 14) if before.count(size) >= STEPS - 1} == {1, 2, 4, 8, 13}
        assert [tokens for _, tokens in steps if tokens > 4][-3:] == list(lessons(scheduler, 90)) == [8, 16, 32]
        assert local.books_balance
        steps.clear()
        local._warm_up.rest(local.engine, scheduler, max_model_len=90)
        after = [decodes for decodes, tokens in steps if not tokens]
        assert {size for size in range(1, 14) if after.count(size) >= STEPS_REST - 1} == {1, 2, 4, 8, 12, 13}
        assert local.books_balance
        steps.clear()
        local._warm_up.rest(local.engine, scheduler, max_model_len=90)
        assert steps == []


class RoomyEngine(FakeEngine):
    """With what the warm-up asks of a real one beside its steps."""

    vocab_size, others_seen_s = 100, float("-inf")

    def __init__(self, publish) -> None:
        self.prepared: list[bool] = []
        super().__init__(publish, lambda _request: [7] * 100_000)

    def load(self):
        num_others = sum(not name.startswith("warm-up") for name in list(self._running))
        return replace(super().load(), num_running=num_others, num_free_kv_blocks=1000)

    def prepare(self, on: bool) -> None:
        self.prepared.append(on)

    def abort(self, request_id: str) -> None:
        super().abort(request_id)
        self._publish([RequestOutput(request_id, [], finish_reason=FinishReason.CANCELLED)])


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch):
    """An engine whose warm-up in idle time has begun and waits for steps."""
    monkeypatch.setattr(warm_up, "QUIET_S", 0.01)
    heard: list[str] = []
    warm = WarmUp(lambda outputs: heard.extend(output.request_id for output in outputs))
    engine = RoomyEngine(warm.publish)
    engine.allow(0)
    thread = threading.Thread(
        target=warm.rest, args=(engine, SchedulerConfig(max_num_seqs=8)), kwargs={"max_model_len": 100_000}
    )
    thread.start()
    with engine._changed:
        assert engine._changed.wait_for(lambda: engine.submitted, 10)
    yield warm, engine, thread, heard
    warm.stop()
    engine.allow(-1)
    thread.join(10)
    engine.stop()
    assert not thread.is_alive()


def test_own_requests_are_nobodys_load(tiny_checkpoint):
    """Gateways and the autoscaler read it: neither should hold a client back, or start replicas, for them."""
    loads = []
    local = LocalEngine(tiny_checkpoint, cache=CacheConfig(kv_memory_bytes=4 << 20))
    warm = WarmUp(lambda _outputs: None)

    def publish(outputs):
        loads.append((local.engine.scheduler.num_running, local.engine.load().num_running))
        warm.publish(outputs)

    local.engine._publish = publish
    with local:
        warm.run(local.engine, SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=4), max_model_len=100)
        assert {reported for _, reported in loads} == {0}
        assert max(running for running, _ in loads) >= 4
        local.engine.submit(
            EngineRequest(request_id="client", prompt_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=4))
        )
        assert local.engine.wait_until_idle(60)
        assert loads[-2] == (1, 1)
        assert local.engine.load().num_running == local.engine.load().num_waiting == 0


def test_who_comes_ends_the_warm_up_of_idle_time_within_a_step_and_it_goes_on_later(idle):
    _, engine, thread, heard = idle
    client = EngineRequest(request_id="client", prompt_ids=(1,), sampling=SamplingParams(max_tokens=3))
    engine.submit(client)
    engine.allow(1)
    with engine._changed:
        assert engine._changed.wait_for(lambda: engine.aborted, 10)
    assert engine.prepared == [True, False]
    assert len(engine.aborted) == 1
    assert heard == ["client"]
    engine.allow(-1)
    thread.join(10)
    assert not thread.is_alive()
    assert heard.count("client") == 3
    assert engine.prepared == [True, False] * 2
    assert len(engine.submitted) == 1 + 1 + 8
    assert len(engine.aborted) == 1 + 8


def test_another_replicas_tokens_end_it_too(idle):
    warm, engine, thread, _ = idle
    engine.others_seen_s = float("inf")
    engine.allow(1)
    with engine._changed:
        assert engine._changed.wait_for(lambda: engine.aborted, 10)
    assert engine.prepared == [True, False]
    engine.allow(-1)
    thread.join(0.1)
    assert thread.is_alive()
    assert len(engine.submitted) == 1, "nothing is begun while others are at work"
    warm.stop()
    thread.join(10)
    assert not thread.is_alive()


def test_an_engine_answers_itself_and_nobody_else_hears_of_it(tiny_checkpoint):
    heard: list[RequestOutput] = []
    local = LocalEngine(tiny_checkpoint, cache=CacheConfig(kv_memory_bytes=4 << 20))
    warm = WarmUp(heard.extend)
    local.engine._publish = warm.publish
    with local:
        seconds = warm.run(local.engine, SchedulerConfig(max_num_batched_tokens=64), max_model_len=100)
        assert seconds > 0
        assert heard == []
        assert local.books_balance
        local.engine.submit(
            EngineRequest(request_id="client", prompt_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=4))
        )
        assert local.engine.wait_until_idle(60)
    assert [i for output in heard for i in output.token_ids] != []
    assert {output.request_id for output in heard} == {"client"}


def test_clients_are_served_beside_it_and_a_silent_engine_ends_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(warm_up, "TIMEOUT_S", 0.2)
    heard: list[str] = []
    warm = WarmUp(lambda outputs: heard.extend(output.request_id for output in outputs))
    engine = FakeEngine(warm.publish, lambda _request: [7] * 10)
    engine.vocab_size = 100
    try:
        engine.allow(0)
        engine.submit(EngineRequest(request_id="client", prompt_ids=(1,), sampling=SamplingParams(max_tokens=8)))
        running = threading.Thread(target=warm.run, args=(engine, SchedulerConfig()), kwargs={"max_model_len": 512})
        running.start()
        running.join(10)
        assert not running.is_alive()
        assert engine.aborted == ["warm-up-16"]
        assert [len(request.prompt_ids) for request in engine.submitted] == [1, 16], "no longer prompt after a failure"
        engine.allow(-1)
        assert engine.wait_idle()
    finally:
        engine.stop()
    assert heard == ["client"] * 8


def test_a_refused_warm_up_is_said_and_does_not_stop_the_start(caplog: pytest.LogCaptureFixture):
    warm = WarmUp(lambda _outputs: None)
    engine = FakeEngine(warm.publish, lambda _request: [7] * 10)
    engine.vocab_size, engine.refuse = 100, KVCacheExhausted("full")
    try:
        warm.run(engine, SchedulerConfig(), max_model_len=512)
    finally:
        engine.stop()
    assert "no warm-up with a prompt of 16 tokens: full" in caplog.text


@pytest.mark.parametrize("form", ["bf16", "fp8"])
def test_whatever_plan_a_step_chooses_was_compiled_ahead(form: str, tmp_path):
    hidden, width, num_experts = 2048, 768, 128
    kernels = compile_ahead.wgmma_kernels(form, num_experts, hidden, width, 8)
    plans = [choose_plan(form, n, num_experts, hidden, width) for n in (1, 8, 64, 1024, 4096, 6000, 10_000, 131_072)]
    chosen = {id(gemm_kernel(plan, hidden, width)) for plan in plans}
    chosen |= {id(route_and_pack_pairs_kernel(num_experts, hidden, 8, form == "fp8", plan.tile)) for plan in plans}
    assert chosen <= {id(kernel) for kernel in kernels}
    assert len(compile_ahead.wgmma_kernels(form, 512, hidden, width, 8)) < len(kernels)  # these take two launches


def test_the_other_path_knows_its_plans_too():
    sizes = (128, 4096, 1536)
    kernels = compile_ahead.mma_kernels("int4", *sizes, top_k=8, has_zeros=False, scales_bf16=False, capability=(9, 0))
    for pairs in (1, 8, 100, 256, 1024, 4096, 131_072):
        plan = choose_mma_plan("int4", pairs, *sizes, has_zeros=False, capability=(9, 0))
        assert mma_kernel(plan, *sizes[1:], 8, False) in kernels
    assert len(kernels) == len(set(map(id, kernels))) <= 6


def test_compiling_ahead_leaves_nothing_to_compile(tmp_path, monkeypatch: pytest.MonkeyPatch):
    kernels = compile_ahead.wgmma_kernels("bf16", 16, 256, 128, 8)
    jit._compile.cache_clear()
    monkeypatch.setattr(jit, "_cache_directory", tmp_path)
    compile_ahead.compile_ahead(kernels, "sm_90a")
    assert len(list(tmp_path.glob("*.cubin"))) == len(kernels) >= 2
    before = jit._compile.cache_info().misses
    for kernel in kernels:
        jit.compile_only(kernel.file, "sm_90a", kernel.defines)
    assert jit._compile.cache_info().misses == before
