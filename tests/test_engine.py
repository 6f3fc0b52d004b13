"""The engine on a model whose next token depends on every KV entry: whatever happens, a stream is the solo stream."""

import random
import threading

import pytest
from attention_fakes import VOCAB, AheadRunner, Collector, FakeMesh, HashModel, greedy_stream, next_logits, request

from expertmesh.cluster.attention.engine import Engine
from expertmesh.cluster.attention.runner import Runner
from expertmesh.config import SchedulerConfig
from expertmesh.errors import InvalidRequest, KVCacheExhausted, QueueFull, ReplicaLost, Unavailable
from expertmesh.request import FinishReason, ThinkingBudget


class World:
    """An engine with its neighbours; at the end its books must balance."""

    make_runner: type[Runner] = Runner

    def __init__(self, *, num_blocks=64, block_size=4, max_model_len=200, manual=False, max_prefill=1 << 20, **options):
        self.model = HashModel(block_size)
        self.mesh = FakeMesh(manual=manual, max_prefill=max_prefill)
        self.out = Collector()
        self.now = [1000.0]
        prefix = options.pop("enable_prefix_cache", True)
        publish = options.pop("publish", self.out)
        observer, on_failure = options.pop("observer", None), options.pop("on_failure", None)
        self.runner = self.make_runner(self.model, num_blocks=num_blocks, block_size=block_size, vocab_size=VOCAB)
        self.engine = Engine(
            self.runner,
            self.mesh,
            scheduler=SchedulerConfig(**options),
            publish=publish,
            max_model_len=max_model_len,
            enable_prefix_cache=prefix,
            clock=lambda: self.now[0],
            observer=observer,
            on_failure=on_failure,
        )
        self.mesh.on_header = self.engine.on_header

    def __enter__(self):
        self.engine.start()
        return self

    def __exit__(self, *exception):
        self.engine.stop()
        if exception[0] is None:
            self.check_books()

    def check_books(self):
        scheduler = self.engine.scheduler
        if self.engine.failure is None or not list(scheduler.sequences()):
            scheduler.check_integrity()
            assert scheduler.cache.num_free_blocks == scheduler.cache.num_blocks
            assert not list(scheduler.sequences())
        assert not self.engine._live_ids
        assert not self.engine._thread.is_alive()


@pytest.fixture(params=[Runner, AheadRunner], autouse=True)
def runner(request, monkeypatch):
    """Every promise holds in lock-step and where steps run ahead of the host."""
    monkeypatch.setattr(World, "make_runner", request.param)
    return request.param


def prompts(count, low, high, seed=1):
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(low, high))] for _ in range(count)]


def run_all(world, requests):
    for r in requests:
        world.engine.submit(r)
    world.out.wait(*(r.request_id for r in requests))


def test_greedy_stream_is_the_models_own():
    with World() as w:
        run_all(w, [request("a", range(10), max_tokens=20)])
        assert w.out.tokens["a"] == greedy_stream(range(10), 20)
        assert w.out.finished["a"].finish_reason is FinishReason.LENGTH
        first, *rest = w.out.outputs["a"]
        assert first.queue_s == 0.0
        assert first.num_cached_tokens == 0
        assert all(len(o.token_ids) == 1 for o in [first, *rest])


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize(
    ("num_blocks", "max_prefill", "budget"), [(400, 1 << 20, 512), (34, 9, 24), (26, 3, 7), (30, 64, 64)]
)
def test_streams_equal_solo_runs_under_preemption_chunking_and_prefix_cache(
    prefix_cache, num_blocks, max_prefill, budget
):
    texts = prompts(24, 1, 40)
    shared = texts[0][:13]
    texts = [shared + t if i % 3 == 0 else t for i, t in enumerate(texts)]
    rng = random.Random(7)
    requests = [request(f"r{i}", t, max_tokens=rng.randint(1, 40)) for i, t in enumerate(texts)]
    with World(
        num_blocks=num_blocks,
        max_prefill=max_prefill,
        max_num_batched_tokens=budget,
        enable_prefix_cache=prefix_cache,
    ) as w:
        run_all(w, requests)
        for r in requests:
            assert w.out.tokens[r.request_id] == greedy_stream(r.prompt_ids, r.sampling.max_tokens), r.request_id
        assert (w.engine.scheduler.num_preemptions > 0) == (num_blocks < 100)


def test_sampled_streams_do_not_depend_on_company():
    texts = prompts(16, 3, 30, seed=3)
    kinds = [
        {"temperature": 0.8, "top_k": 20, "top_p": 0.95},
        {"temperature": 1.3},
        {"temperature": 1.0, "top_p": 0.6, "presence_penalty": 1.0},
        {"temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.2},
    ]
    requests = [request(f"r{i}", t, max_tokens=25, seed=100 + i, **kinds[i % 4]) for i, t in enumerate(texts)]
    solo = {}
    for r in requests:
        with World() as w:
            run_all(w, [r])
            solo.update(w.out.tokens)
    with World(num_blocks=30, max_prefill=11) as w:
        run_all(w, requests)
        assert w.engine.scheduler.num_preemptions > 0
        assert w.out.tokens == solo


def test_next_turn_reuses_prompt_and_output_blocks():
    with World(num_blocks=64, block_size=4) as w:
        first = list(range(30))
        run_all(w, [request("turn1", first, max_tokens=21)])
        second = first + w.out.tokens["turn1"] + [5, 6, 7]
        run_all(w, [request("turn2", second, max_tokens=5)])
        assert w.out.outputs["turn2"][0].num_cached_tokens >= 51 - 4
        assert w.out.tokens["turn2"] == greedy_stream(second, 5)
        run_all(w, [request("other", second, max_tokens=5, prefix_salt=b"another key")])
        assert w.out.outputs["other"][0].num_cached_tokens == 0
        assert w.out.tokens["other"] == w.out.tokens["turn2"]


def test_identical_prompt_leaves_a_token_to_compute():
    with World(block_size=4) as w:
        run_all(w, [request("a", range(16), max_tokens=3)])
        run_all(w, [request("b", range(16), max_tokens=3)])
        assert w.out.outputs["b"][0].num_cached_tokens == 12
        assert w.out.tokens["a"] == w.out.tokens["b"]


def test_replay_goes_on_after_given_output():
    whole = greedy_stream(range(9), 20)
    with World() as w:
        run_all(w, [request("a", range(9), max_tokens=20, output_ids=tuple(whole[:7]))])
        assert w.out.tokens["a"] == whole[7:]
        run_all(w, [request("b", range(9), max_tokens=20, output_ids=tuple(whole))])
        assert w.out.tokens["b"] == []
        assert w.out.finished["b"].finish_reason is FinishReason.LENGTH


def test_replayed_sampling_draws_the_same():
    def make(name, **fields):
        return request(name, range(9), max_tokens=20, temperature=1.0, seed=42, presence_penalty=0.5, **fields)

    with World() as w:
        run_all(w, [make("a")])
        whole = w.out.tokens["a"]
        run_all(w, [make("b", output_ids=tuple(whole[:11]))])
        assert w.out.tokens["b"] == whole[11:]


def test_stop_id_ends_the_text_and_min_tokens_suppresses_it():
    stream = greedy_stream(range(5), 30)
    stop = stream[6]
    with World() as w:
        run_all(w, [request("a", range(5), max_tokens=30, stop_token_ids=frozenset([stop]))])
        assert w.out.tokens["a"] == stream[: stream.index(stop) + 1]
        assert w.out.finished["a"].finish_reason is FinishReason.STOP
        run_all(w, [request("b", range(5), max_tokens=30, min_tokens=12, stop_token_ids=frozenset([stop]))])
        assert stop not in w.out.tokens["b"][:12]
        assert len(w.out.tokens["b"]) > 12


def test_context_end_is_length():
    with World(max_model_len=20) as w:
        run_all(w, [request("a", range(15), max_tokens=100)])
        assert len(w.out.tokens["a"]) == 5
        assert w.out.finished["a"].finish_reason is FinishReason.LENGTH


def test_pool_end_is_the_contexts_end_for_a_lone_request():
    with World(num_blocks=6, block_size=4, max_model_len=1000) as w:
        run_all(w, [request("a", range(15), max_tokens=100)])
        assert w.out.tokens["a"] == greedy_stream(range(15), 10)
        assert w.out.finished["a"].finish_reason is FinishReason.LENGTH


def test_abort_ends_the_request_and_leaves_the_others_alone():
    with World(manual=True) as w:
        texts = {name: [i] * 9 for i, name in enumerate("abc")}
        for name, text in texts.items():
            w.engine.submit(request(name, text, max_tokens=12))
        w.mesh.wait_for_bid(1)
        for _ in range(4):
            w.mesh.issue(64)
        w.out.wait_tokens("b", 4)
        for name in ("b", "b", "unknown"):
            w.engine.abort(name)
        for _ in range(8):
            w.mesh.issue(64)
        w.out.wait("a", "b", "c")
        assert w.out.finished["b"].finish_reason is FinishReason.CANCELLED
        for name in ("a", "c"):
            assert w.out.tokens[name] == greedy_stream(texts[name], 12)
        assert w.out.tokens["b"] == greedy_stream(texts["b"], 12)[:4]


def test_cancelled_work_is_withdrawn_and_a_header_that_comes_late_is_served():
    with World(manual=True) as w:
        w.engine.submit(request("a", range(9), max_tokens=12))
        assert w.mesh.wait_for_bid(1) == (0, 9)
        w.engine.abort("a")
        assert w.mesh.wait_for_bid(2) == (0, 0)
        w.mesh.issue(9)
        w.mesh.wait_for_step(1)
        w.engine.submit(request("b", range(4), max_tokens=1))
        w.mesh.wait_for_bid(3)
        w.mesh.issue(4)
        w.out.wait("a", "b")
        assert w.mesh.steps[0].served
        assert not w.mesh.steps[1].served


def test_rank_without_own_work_serves():
    with World(manual=True) as w:
        w.mesh.issue(0)
        w.engine.submit(request("a", range(4), max_tokens=1))
        w.mesh.wait_for_bid(1)
        w.mesh.issue(0)
        w.mesh.issue(4)
        w.out.wait("a")
        assert [s.served for s in w.mesh.steps] == [True, True, False]


@pytest.mark.parametrize("turn", [0, 1])
def test_failed_step_is_run_again_with_the_same_batch(turn):
    texts = prompts(12, 1, 30, seed=5)
    requests = [request(f"r{i}", t, max_tokens=15, temperature=0.9, seed=i) for i, t in enumerate(texts)]
    with World() as w:
        run_all(w, requests)
        undisturbed = dict(w.out.tokens)
    with World(num_blocks=40, max_prefill=16) as w:
        w.mesh.fail = lambda step_id: turn if step_id % 3 else None
        w.mesh.fail_enter = lambda step_id: step_id % 11 == 0
        run_all(w, requests)
        assert w.out.tokens == undisturbed


def test_kept_batch_is_asked_for_whole_and_waits_for_room():
    with World(manual=True) as w:
        w.mesh.fail = lambda step_id: 1 if step_id == 1 else None
        w.engine.submit(request("a", range(9), max_tokens=1))
        assert w.mesh.wait_for_bid(1) == (0, 9)
        w.mesh.issue(9)
        assert w.mesh.wait_for_bid(2) == (9, 0)
        w.mesh.issue(4)  # too little: serves
        assert w.mesh.wait_for_bid(3) == (9, 0)
        w.mesh.issue(9)
        w.out.wait("a")
        assert [s.served for s in w.mesh.steps] == [False, True, False]
        assert w.out.tokens["a"] == greedy_stream(range(9), 1)


def test_request_cancelled_while_its_batch_waits_is_answered_at_once_and_the_batch_still_runs():
    with World(manual=True) as w:
        w.mesh.fail = lambda step_id: 0 if step_id == 1 else None
        w.engine.submit(request("a", range(9), max_tokens=3))
        w.mesh.wait_for_bid(1)
        w.engine.submit(request("b", range(20, 25), max_tokens=2))
        w.mesh.issue(14)
        w.mesh.wait_until_bid((14, 0), (9, 0))
        w.engine.abort("a")
        w.out.wait("a")
        for _ in range(4):
            w.mesh.issue(14)
        w.out.wait("b")
        assert w.out.tokens["b"] == greedy_stream(range(20, 25), 2)


def test_kept_batch_that_nobody_waits_for_is_dropped():
    with World(manual=True) as w:
        w.mesh.fail = lambda step_id: 0
        w.engine.submit(request("a", range(9), max_tokens=3))
        w.mesh.wait_for_bid(1)
        w.mesh.issue(9)
        w.mesh.wait_until_bid((9, 0))
        w.engine.abort("a")
        w.out.wait("a")
        w.mesh.wait_until_bid((0, 0))


def test_deadline_ends_a_request_even_when_no_step_comes():
    with World(manual=True) as w:
        w.engine.submit(request("late", range(9), max_tokens=3, deadline=1000.02))
        w.engine.submit(request("done", range(3), max_tokens=3, deadline=2000.0))
        w.mesh.wait_for_bid(1)
        w.now[0] = 1000.03
        w.out.wait("late")
        assert w.out.finished["late"].finish_reason is FinishReason.ERROR
        assert w.out.finished["late"].error_code == "DEADLINE_EXCEEDED"
        for _ in range(4):
            w.mesh.issue(12)
        w.out.wait("done")
        assert w.out.tokens["done"] == greedy_stream(range(3), 3)


def test_bad_requests_are_refused_at_once():
    with World(num_blocks=8, block_size=4, max_model_len=40, manual=True, max_num_waiting=2) as w:
        with pytest.raises(InvalidRequest, match="context"):
            w.engine.submit(request("a", range(40)))
        with pytest.raises(KVCacheExhausted, match="9 KV blocks of 4 tokens, the pool has 8"):
            w.engine.submit(request("a", range(35)))
        with pytest.raises(InvalidRequest, match=r"0\.\.96"):
            w.engine.submit(request("a", [VOCAB]))
        with pytest.raises(InvalidRequest, match="at least 1"):
            w.engine.submit(request("a", []))
        w.engine.submit(request("a", [1]))
        with pytest.raises(InvalidRequest, match="running already"):
            w.engine.submit(request("a", [1]))
        w.engine.submit(request("b", [1]))
        with pytest.raises(QueueFull) as full:
            w.engine.submit(request("c", [1]))
        assert full.value.retry_after_s > 0
        w.engine.abort("a")
        w.engine.abort("b")
        w.out.wait("a", "b")


def test_drain_finishes_what_is_there():
    with World() as w:
        w.engine.submit(request("a", range(9), max_tokens=60))
        w.engine.drain()
        with pytest.raises(Unavailable, match="draining"):
            w.engine.submit(request("b", [1]))
        assert w.engine.load().draining
        assert w.engine.wait_until_idle(30)
        assert w.out.tokens["a"] == greedy_stream(range(9), 60)


def test_stop_answers_everything_at_hand():
    with World(manual=True) as w:
        w.engine.submit(request("a", range(9)))
        w.mesh.wait_for_bid(1)
        w.engine.stop()
        assert w.out.finished["a"].error_code == "UNAVAILABLE"
        with pytest.raises(ReplicaLost):
            w.engine.submit(request("b", [1]))
        w.engine.scheduler.remove(w.engine.scheduler.get("a"))


def test_crash_of_the_engine_fails_every_request_and_is_seen():
    failures = []
    with World(manual=True, on_failure=failures.append) as w:
        w.model.forward = lambda *_: 1 // 0
        for name in ("a", "b"):
            w.engine.submit(request(name, range(9)))
        w.mesh.wait_for_bid(1)
        w.mesh.issue(18)
        w.out.wait("a", "b")
        assert w.out.finished["a"].error_code == "UNAVAILABLE"
        assert "ZeroDivisionError" in w.out.finished["b"].error_message
        assert isinstance(w.engine.failure, ReplicaLost)
        with pytest.raises(ReplicaLost):
            w.engine.submit(request("c", [1]))
        w.engine.stop()
        assert failures == [w.engine.failure]


def test_publish_that_raises_does_not_hang_anybody():
    def publish(outputs):
        raise RuntimeError("the link is gone")

    with World(publish=publish) as w:
        w.engine.submit(request("a", range(9)))
        assert w.engine.wait_until_idle(20)
        assert isinstance(w.engine.failure, ReplicaLost)


def test_row_that_is_not_finite_ends_its_request_alone_and_is_not_cached():
    with World(enable_prefix_cache=True) as w:
        w.model.poison = {50}
        run_all(w, [request("bad", [3] * 8 + [50], max_tokens=4), request("good", range(9), max_tokens=4)])
        assert w.out.finished["bad"].error_code == "INTERNAL"
        assert w.out.tokens["bad"] == []
        assert w.out.tokens["good"] == greedy_stream(range(9), 4)
        run_all(w, [request("again", [3] * 8 + [4], max_tokens=1)])
        assert w.out.outputs["again"][0].num_cached_tokens == 0


def test_one_publish_a_step_carries_all_requests():
    with World(manual=True) as w:
        for i in range(5):
            w.engine.submit(request(f"r{i}", [i], max_tokens=3))
        w.mesh.wait_for_bid(1)
        for _ in range(6):
            w.mesh.issue(64)
        w.out.wait(*(f"r{i}" for i in range(5)))
        assert max(len(call) for call in w.out.calls) >= 4
        assert len(w.out.calls) <= 5


@pytest.mark.parametrize("budget_tokens", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("num_blocks", [64, 14])
def test_thinking_budget_is_exact_under_preemption_and_counts_against_max_tokens(budget_tokens, num_blocks):
    budget = ThinkingBudget(
        budget_tokens=budget_tokens, think_id=90, end_think_id=91, closing_ids=(70, 71, 91, 72), starts_inside=True
    )
    requests = [request(f"r{i}", [i, 3, i], max_tokens=16, thinking=budget) for i in range(5)]
    with World(num_blocks=num_blocks) as w:
        run_all(w, requests)
        assert (w.engine.scheduler.num_preemptions > 0) == (num_blocks == 14)
        for r in requests:
            tokens = w.out.tokens[r.request_id]
            assert len(tokens) == 16
            head = tokens[:budget_tokens]
            if 91 not in head:
                assert tokens[budget_tokens : budget_tokens + 4] == [70, 71, 91, 72]
                context = [*r.prompt_ids, *tokens[: budget_tokens + 4]]
                assert tokens[budget_tokens + 4] == int(next_logits(context).argmax())


def test_logprobs_travel_with_their_tokens():
    with World() as w:
        run_all(w, [request("a", range(9), max_tokens=4, num_logprobs=3, temperature=1.0, seed=1)])
        for output in w.out.outputs["a"]:
            assert [p.token_id for p in output.logprobs] == output.token_ids
            assert len(output.logprobs[0].top) == 3


def test_the_next_step_is_launched_before_the_last_one_is_collected(runner):
    with World() as w:
        run_all(w, [request(f"r{i}", [i, 3, i], max_tokens=30) for i in range(4)])
        assert all(w.out.tokens[f"r{i}"] == greedy_stream([i, 3, i], 30) for i in range(4))
        if runner is AheadRunner:
            assert w.runner.most_in_flight == 2


def test_nothing_runs_ahead_of_what_the_host_decides(runner):
    with World() as w:
        run_all(w, [request("a", [5, 3], max_tokens=20, repetition_penalty=1.2), request("b", [7], max_tokens=20)])
        assert w.out.tokens["b"] == greedy_stream([7], 20)
        if runner is AheadRunner:
            assert w.runner.most_in_flight == 1


def test_observer_sees_each_step():
    class Observer:
        def __init__(self):
            self.stats = []

        def observe(self, stats):
            self.stats.append(stats)

    observer = Observer()
    with World(observer=observer) as w:
        w.mesh.fail = lambda step_id: 0 if step_id == 2 else None
        run_all(w, [request("a", range(9), max_tokens=4)])
    assert [s.num_prefill_tokens for s in observer.stats] == [9, 0, 0, 0, 0]
    assert [s.num_decode_tokens for s in observer.stats] == [0, 1, 1, 1, 1]
    assert [s.error is not None for s in observer.stats] == [False, True, False, False, False]
    assert observer.stats[-1].num_free_kv_blocks == observer.stats[-1].num_kv_blocks


def test_submit_and_abort_from_many_threads():
    texts = prompts(60, 1, 20, seed=11)
    with World(num_blocks=40, max_prefill=32, max_num_seqs=16) as w:

        def client(k):
            for i in range(k, 60, 4):
                w.engine.submit(request(f"r{i}", texts[i], max_tokens=10 + i % 7))
                if i % 5 == 0:
                    w.engine.abort(f"r{i}")

        threads = [threading.Thread(target=client, args=(k,)) for k in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        w.out.wait(*(f"r{i}" for i in range(60)))
        for i in range(60):
            whole = greedy_stream(texts[i], 10 + i % 7)
            got = w.out.tokens.get(f"r{i}", [])
            assert got == whole[: len(got)]
            assert len(got) == len(whole) or w.out.finished[f"r{i}"].finish_reason is FinishReason.CANCELLED
