"""Steps that hold prompts on one GPU: what runs in graphs is what runs eagerly, bit for bit; few tokens far into a long
context take the right kernel and come out right."""

import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from flash_world import random_step

from expertmesh.bench.local_engine import LocalEngine
from expertmesh.config import CacheConfig, SchedulerConfig
from expertmesh.errors import KernelError
from expertmesh.make_checkpoint import make_checkpoint
from expertmesh.request import EngineRequest, SamplingParams
from expertmesh.router.leader import PROMPT_BUCKETS

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from expertmesh.cluster.attention import device_runner, prompt_graphs, warm_up  # noqa: E402
from expertmesh.cluster.attention.device_runner import DeviceRunner  # noqa: E402
from expertmesh.cluster.attention.flash import FlashAttention  # noqa: E402
from expertmesh.cluster.attention.pace import Allowance  # noqa: E402
from expertmesh.cluster.attention.prompt_graphs import PromptGraphs  # noqa: E402

try:
    FlashAttention(8, 1, 128, 16, "cuda", max_num_reqs=1, max_num_blocks=1)
except KernelError as error:
    pytest.skip(str(error), allow_module_level=True)

MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 2000,
    "hidden_size": 512,
    "intermediate_size": 768,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "initializer_range": 0.05,
}
DENSE = {**MOE, "model_type": "qwen3", "num_experts": None, "num_experts_per_tok": None, "moe_intermediate_size": None}
LENGTHS = (2, 16, 5, 17, 40, 40, 64, 100, 130, 200, 130, 500, 300, 384, 450, 513, 600, 1000, 900, 1024, 897)


@pytest.fixture(scope="module", params=["moe", "dense"])
def folder(request, tmp_path_factory):
    config = {k: v for k, v in (MOE if request.param == "moe" else DENSE).items() if v is not None}
    folder = tmp_path_factory.mktemp(request.param)
    make_checkpoint(folder, config, seed=11, dtype="bfloat16")
    return folder


def engine_of(folder, *, batch_invariant=False, **scheduler):
    engine = LocalEngine(
        folder,
        cache=CacheConfig(num_blocks=2000, enable_prefix_cache=False),
        device="cuda",
        batch_invariant=batch_invariant,
        scheduler=SchedulerConfig(**scheduler),
    )
    assert isinstance(engine.runner, DeviceRunner)
    assert engine.runner.prompt_graphs is not None
    return engine


def request(name, length, max_tokens=2, seed=None, **sampling):
    ids = np.random.default_rng(length if seed is None else seed).integers(0, 2000, length).tolist()
    return EngineRequest(
        request_id=name, prompt_ids=tuple(ids), sampling=SamplingParams(max_tokens=max_tokens, **sampling)
    )


def logits_of(engine, lengths):
    """Of the prompts of these lengths, one after the other, and their tokens."""
    kept, logits = [], engine.runner.model.logits

    def keep(x, rows, num_tokens):
        found = logits(x, rows, num_tokens)
        if not torch.cuda.is_current_stream_capturing() and rows is not None:
            kept.append(found.clone())
        return found

    engine.runner.model.logits = keep
    with engine:
        streams = [engine.run([request(f"r{i}", n)])[0] for i, n in enumerate(lengths)]
        assert engine.books_balance
    return kept, [s.token_ids for s in streams]


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["plain", "invariant"])
def test_a_replayed_step_is_the_eager_one_bit_for_bit(folder, batch_invariant, monkeypatch):
    engine = engine_of(folder, batch_invariant=batch_invariant)
    logits, tokens = logits_of(engine, LENGTHS)
    graphs = engine.runner.prompt_graphs
    assert (graphs.num_captures, graphs.num_replays) == (7, 11), "buckets 16, 64, 192, 384, 512, 640, 1024 came again"
    monkeypatch.setattr(PromptGraphs, "_capture", lambda self, key, line, step: None)
    other = engine_of(folder, batch_invariant=batch_invariant)
    eager, eager_tokens = logits_of(other, LENGTHS)
    assert other.runner.prompt_graphs.num_replays == 0
    assert len(logits) == len(eager) == len(LENGTHS)
    assert all(torch.isfinite(one).all() for one in logits)
    for ours, theirs in zip(logits, eager, strict=True):
        assert ours.equal(theirs)
    assert tokens == eager_tokens


def test_a_padded_step_is_the_step(folder):
    """In batch-invariant mode; else products of another shape round in another way."""
    padded, tokens = logits_of(engine_of(folder, batch_invariant=True), LENGTHS)
    plain = engine_of(folder, batch_invariant=True)
    plain.runner.prompt_graphs = None
    exact, exact_tokens = logits_of(plain, LENGTHS)
    for ours, theirs in zip(padded, exact, strict=True):
        assert ours.equal(theirs)
    assert tokens == exact_tokens


def test_prompts_that_join_decodes_in_graphs_change_no_stream(folder):
    requests = [request(f"r{i}", 3 + 31 * i, max_tokens=60, seed=i, temperature=0.7 * (i % 2)) for i in range(10)]
    with engine_of(folder, batch_invariant=True) as one:
        alone = [one.run([r])[0].token_ids for r in requests]
    for chunk in (40, 300):
        with engine_of(folder, batch_invariant=True, max_prefill_tokens_per_step=chunk) as engine:
            for round_id in range(3):
                named = [replace(r, request_id=f"{round_id}{r.request_id}") for r in requests]
                streams = []
                for r in named:
                    streams.append(engine.submit(r))
                    engine.wait_for_step_after_now()
                engine.wait([r.request_id for r in named])
                assert [s.token_ids for s in streams] == alone
            assert engine.runner.prompt_graphs.num_replays > 10
            assert engine.books_balance


def test_of_too_many_sets_the_oldest_is_dropped_and_made_again(folder, monkeypatch):
    monkeypatch.setattr(prompt_graphs, "MAX_SETS", 2)
    engine = engine_of(folder, batch_invariant=True)
    lengths = [n for n in (10, 30, 60, 90) for _ in range(3)] * 2
    logits, _ = logits_of(engine, lengths)
    graphs = engine.runner.prompt_graphs
    assert (graphs.num_captures, graphs.num_replays) == (8, 16)
    assert len(graphs._captured) == 2
    by_length = {}
    for length, one in zip(lengths, logits, strict=True):
        assert one.equal(by_length.setdefault(length, one))


def num_pinned():
    return torch.cuda.host_memory_stats()["num_host_alloc"]


def test_a_warm_engine_captures_nothing_and_makes_no_memory_beside_streams(folder):
    with engine_of(folder, max_num_seqs=16) as engine:
        engine.warm_up()
        graphs, runner = engine.runner.prompt_graphs, engine.runner
        captures, met, replays = graphs.num_captures, set(graphs._met), graphs.num_replays
        assert len(met) == len([size for size in PROMPT_BUCKETS if size <= 1152]) == captures
        decodes, eager, pinned, replayed = runner.num_captures, runner.num_eager, num_pinned(), runner.num_replays
        assert decodes == sum(len(runner.attention.forms(size)) for size in (1, 2, 4, 8, 12, 16))
        short = [request(f"short{i}", 20 + i, max_tokens=300 + 10 * i, seed=i) for i in range(13)]
        for one in short:
            engine.submit(one)
        for length in (3000, 700, 90, 1500, 1024, 9000):
            engine.run([request(f"long{length}", length)])
        engine.wait([one.request_id for one in short])
        assert (graphs.num_captures, graphs._met) == (captures, met)
        assert (runner.num_captures, runner.num_eager, num_pinned()) == (decodes, eager, pinned)
        of_prompts, of_decodes = graphs.num_replays - replays, runner.num_replays - replayed
        assert of_prompts >= 8
        assert of_decodes > 0
        assert of_prompts + of_decodes >= short[-1].sampling.max_tokens, "each token a step, and each step a graph"
        assert engine.books_balance


def test_a_larger_bucket_does_for_one_that_is_not_captured_until_that_has_been_wanted_often(folder, monkeypatch):
    monkeypatch.setattr(warm_up, "BOUND_S", 60.0)
    requests = [request(f"r{i}", 3 + 31 * i, max_tokens=60, seed=i) for i in range(11)]
    with engine_of(folder, batch_invariant=True) as one:
        alone = [one.run([r])[0].token_ids for r in requests]
    with engine_of(folder, batch_invariant=True, max_num_seqs=16) as engine:
        engine._warm_up.run(engine.engine, engine._scheduler, max_model_len=4000)
        runner = engine.runner
        assert {graph.bucket for graph in runner._graphs.values()} == {1, 2, 4, 8, 16}
        captures, eager = runner.num_captures, runner.num_eager
        assert [s.token_ids for s in engine.run(requests)] == alone
        assert (runner.num_captures, runner.num_eager) == (captures, eager)
        monkeypatch.setattr(device_runner, "PATIENCE", 0)
        again = [replace(r, request_id=f"again-{r.request_id}") for r in requests]
        assert [s.token_ids for s in engine.run(again)] == alone
        assert 12 in {graph.bucket for graph in runner._graphs.values()}
        assert runner.num_captures > captures


def test_chunks_that_follow_the_clock_change_no_token(folder):
    """In batch-invariant mode. What a step may take is drawn anew for each, so no two prompts are cut alike."""
    requests = [request(f"r{i}", 7 + 311 * i, max_tokens=40, seed=i, temperature=0.7 * (i % 2)) for i in range(8)]
    with engine_of(folder, batch_invariant=True) as one:
        alone = [one.run([r])[0].token_ids for r in requests]
    for seed in range(3):
        with engine_of(folder, batch_invariant=True) as engine:
            draw = partial(random.Random(seed).choice, (1, 20, 333, 900))
            engine.engine.scheduler.pace.allowance = lambda *_, draw=draw: Allowance(draw(), 2000)
            streams = []
            for r in requests:
                streams.append(engine.submit(r))
                engine.wait_for_step_after_now()
            engine.wait([r.request_id for r in requests])
            assert [s.token_ids for s in streams] == alone
            assert engine.books_balance


def test_an_engine_learns_what_its_steps_take(folder):
    with engine_of(folder, max_num_seqs=64) as engine:
        engine.warm_up()
        pace = engine.engine.scheduler.pace
        assert 0 < pace.base_s(8) < 0.1
        assert 0 < pace.token_s < 1e-3
        company = [request(f"short{i}", 20 + i, max_tokens=400, seed=i) for i in range(8)]
        for one in company:
            engine.submit(one)
        engine.run([request("long", 20_000)])
        engine.wait([one.request_id for one in company])
        allowance = pace.allowance(8)
        assert allowance is not None
        assert allowance.cost > 64
        assert engine.books_balance


CHUNKS = {
    "150 of 40000 beside decodes": ([(1, 300)] * 8 + [(150, 40000)], "short"),
    "200 of 28000": ([(200, 28000), (1, 17)], "short"),
    "512 of 16000": ([(1, 300)] * 8 + [(512, 16000)], "long"),
    "a prompt of 2000": ([(2000, 2000)], "long"),
}


@pytest.mark.parametrize("name", CHUNKS)
def test_a_chunk_takes_the_kernel_that_is_faster(name):
    lengths, kernel = CHUNKS[name]
    step = random_step(lengths, num_heads=32, num_kv_heads=4, device="cuda")
    attention = FlashAttention(32, 4, 128, 16, "cuda", max_num_reqs=16, max_num_blocks=2500)
    attention.load(step.k, step.v)
    attention.plan(step.q_lens, step.seq_lens, step.block_table)
    has_long = attention.library.has_prefill and attention._planned.long is not None
    assert has_long == (kernel == "long" and attention.library.has_prefill)
    out = attention.attend(step.q, step.k, step.v)
    expected = step.reference()
    assert float((out.double() - expected).norm() / expected.norm()) < 5e-3
