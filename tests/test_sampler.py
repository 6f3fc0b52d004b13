"""Sampling: exact distributions, draws that depend on (seed, position) alone, rows that do not see each other."""

import math

import numpy as np
import pytest
import torch

from expertmesh.cluster.attention.draw import largest, philox4x32, uniforms
from expertmesh.cluster.attention.sampler import Sampler
from expertmesh.cluster.attention.sequence import Sequence
from expertmesh.request import EngineRequest, SamplingParams, ThinkingBudget


def row(prompt=(1, 2), output=(), thinking=None, **sampling) -> Sequence:
    params = SamplingParams(**{"max_tokens": 100, **sampling})
    return Sequence.of(
        EngineRequest(
            request_id="r", prompt_ids=tuple(prompt), output_ids=tuple(output), sampling=params, thinking=thinking
        )
    )


def sample(logits, rows, vocab_size=None) -> list[int]:
    logits = torch.as_tensor(logits, dtype=torch.float32)
    return Sampler(vocab_size or logits.shape[1]).sample(logits.clone(), rows).token_ids


def noise(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def expected(logits: np.ndarray, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """The distribution, written straight from its definition."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    kept = order[:top_k] if top_k else order
    total, mass, nucleus = sum(p[i] for i in kept), 0.0, []
    for i in kept:
        if mass >= top_p * total:
            break
        nucleus.append(i)
        mass += p[i]
    kept = [i for i in nucleus if p[i] >= min_p * p.max()]
    out = np.zeros(len(logits))
    out[kept] = p[kept] / p[kept].sum()
    return out


def test_philox_gives_the_published_answers():
    zero = philox4x32(np.array([0], np.uint64), np.array([0], np.uint64))
    assert [int(w[0]) for w in zero] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_uniforms_are_uniform_and_keyed():
    values = uniforms(np.full(100_000, 7, np.uint64), np.arange(100_000, dtype=np.uint64))
    counts, _ = np.histogram(values, bins=100, range=(0, 1))
    assert counts.sum() == 100_000
    assert ((counts - 1000) ** 2 / 1000).sum() < 160  # chi-square, 99 degrees of freedom
    assert len(np.unique(values)) == 100_000
    top = uniforms(np.array([2**64 - 1, 0], np.uint64), np.array([5, 5], np.uint64))
    assert top[0] != top[1]


@pytest.mark.parametrize("vocab", [11, 300, 5000])
@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 5},
        {"top_p": 0.7},
        {"top_p": 0.999},
        {"min_p": 0.1},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        {"temperature": 1.2, "top_k": 8, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_frequencies_are_the_exact_probabilities(vocab, rule):
    """Each count of n draws with fixed seeds lies within 5 sigma; nothing outside the support is ever drawn."""
    logits = noise(1, vocab, seed=vocab)
    rule = {"temperature": 1.0, **rule}
    counts = np.zeros(vocab)
    for seed in range(400 if vocab < 1000 else 50):
        rows = [row(seed=seed, output=[0] * position, **rule) for position in range(8)]
        np.add.at(counts, sample(logits.expand(8, -1), rows), 1)
    n = int(counts.sum())
    p = expected(logits[0].numpy(), **rule)
    assert counts[p == 0].sum() == 0
    sigma = np.sqrt(n * p * (1 - p)) + 1
    assert (np.abs(counts - n * p) < 5 * sigma).all()


@pytest.mark.parametrize("vocab", [37, 1001, 20_011])
def test_a_row_does_not_depend_on_the_others(vocab):
    rules = [
        {"temperature": 0.7, "top_k": 20, "top_p": 0.95},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.5, "top_p": 0.999},
        {"temperature": 0.9, "min_p": 0.02},
        {"temperature": 1.0, "top_k": 500},
        {},
        {"temperature": 0.8, "presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
        {"num_logprobs": 3, "temperature": 0.5},
    ]
    logits = noise(27, vocab)
    rows = [row(seed=i, output=[i % 7] * (i % 5), **rules[i % 9]) for i in range(27)]
    sampler = Sampler(vocab)
    together = sampler.sample(logits.clone(), rows)
    for i in range(27):
        alone = sampler.sample(logits[i : i + 1].clone(), [rows[i]])
        assert alone.token_ids[0] == together.token_ids[i]
        assert alone.logprobs[0] == together.logprobs[i]
    back = sampler.sample(logits.flip(0).clone(), rows[::-1])
    assert back.token_ids[::-1] == together.token_ids


def test_same_seed_and_position_same_draw():
    logits = noise(1, 500).expand(6, -1)
    rows = [row(seed=9, output=[1] * n, temperature=1.0) for n in (0, 1, 2, 0, 1, 2)]
    out = sample(logits, rows)
    assert out[:3] == out[3:]
    longer_prompt = sample(logits[:1], [row(prompt=range(9), seed=9, temperature=1.0)])
    assert longer_prompt == out[:1], "the draw is keyed by the output position"
    assert len({sample(logits[:1], [row(seed=s, temperature=1.5)])[0] for s in range(40)}) > 5


def test_ties_go_to_the_lowest_id():
    logits = torch.zeros(1, 1000)
    logits[0, [40, 70, 900]] = 1.0
    assert sample(logits, [row()]) == [40]
    assert {sample(logits, [row(temperature=1.0, top_k=2, seed=s)])[0] for s in range(60)} == {40, 70}
    values, ids = largest(torch.tensor([[0.0, 2, 1, 2, 1, 1, *[0.0] * 40]]), 3)
    assert ids.tolist() == [[1, 3, 2]]
    assert values.tolist() == [[2, 2, 1]]


@pytest.mark.parametrize("count", [1, 7, 20])
@pytest.mark.parametrize("vocab", [11_000, 12_801, 30_000])
def testlargest_of_a_large_vocabulary_are_exact_with_ties(vocab, count):
    generator = torch.Generator().manual_seed(vocab)
    for spread in (3, 40, 100_000):
        logits = torch.randint(-spread, spread, (6, vocab), generator=generator).float()
        values, ids = largest(logits, count)
        want_values, want_ids = logits.sort(dim=1, descending=True, stable=True)
        assert torch.equal(values, want_values[:, :count])
        assert torch.equal(ids, want_ids[:, :count])


def test_flat_rows_are_drawn_evenly_however_truncated():
    logits = torch.zeros(1, 600)
    seen = {sample(logits, [row(temperature=1.0, top_p=0.5, seed=s)])[0] for s in range(800)}
    assert max(seen) < 300
    assert len(seen) > 260


def test_padding_of_the_vocabulary_is_never_sampled():
    logits = noise(1, 128)
    logits[0, 100:] = 50.0
    rows = [row(), row(temperature=2.0, seed=1), row(temperature=1.0, top_k=5), row(num_logprobs=5)]
    sampled = Sampler(100).sample(logits.expand(4, -1).clone(), rows)
    assert max(sampled.token_ids) < 100
    assert all(i < 100 for i, _ in sampled.logprobs[3].top)


def test_penalties_follow_their_formulas():
    base = noise(1, 50)[0]
    base[3], base[4], base[5] = 2.0, -1.0, 1.5
    rows = [row(prompt=[3, 4], output=[5, 5, 9], presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0)]
    logits = base[None].clone()
    Sampler(50).sample(logits, rows)
    want = base.clone()
    for token in (3, 4, 5, 9):
        want[token] = want[token] / 2 if want[token] > 0 else want[token] * 2
    want[5] -= 0.5 + 0.25 * 2
    want[9] -= 0.5 + 0.25
    torch.testing.assert_close(logits[0], want)


def test_stop_ids_are_suppressed_before_min_tokens():
    logits = torch.zeros(1, 20)
    logits[0, 7], logits[0, 8] = 5.0, 4.0
    stops = frozenset([7, 999])
    assert sample(logits, [row(min_tokens=2, stop_token_ids=stops, output=[1])]) == [8]
    assert sample(logits, [row(min_tokens=2, stop_token_ids=stops, output=[1, 1])]) == [7]


def test_logprobs_are_those_of_the_unmodified_distribution():
    logits = noise(1, 200)
    sequence = row(
        num_logprobs=4, temperature=0.3, top_k=2, presence_penalty=2.0, output=[int(logits.argmax())], seed=3
    )
    sampled = Sampler(200).sample(logits.clone(), [sequence])
    want = torch.log_softmax(logits[0].double(), 0)
    got = sampled.logprobs[0]
    assert got.token_id == sampled.token_ids[0]
    assert got.logprob == pytest.approx(float(want[got.token_id]), abs=1e-6)
    top = want.argsort(descending=True)[:4].tolist()
    assert [i for i, _ in got.top] == top
    assert [v for _, v in got.top] == pytest.approx([float(want[i]) for i in top], abs=1e-6)
    alone = Sampler(200).sample(logits.clone(), [row(num_logprobs=0)]).logprobs[0]
    assert alone.top == ()


def test_rows_that_are_not_finite_are_named():
    logits = noise(4, 30)
    logits[1, 5] = math.nan
    logits[2] = -math.inf
    logits[3, 29] = math.inf
    for kind in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}):
        assert Sampler(30).sample(logits.clone(), [row(**kind)] * 4).finite == [True, False, False, False]


def test_forced_tokens_replace_the_draw():
    budget = ThinkingBudget(budget_tokens=1, think_id=10, end_think_id=11, closing_ids=(12, 11))
    logits = noise(3, 40)
    rows = [
        row(thinking=budget, output=out, temperature=t) for out, t in (([10], 0), ([10, 12], 1.0), ([10, 12, 11], 0))
    ]
    sampled = Sampler(40).sample(logits.clone(), rows)
    assert sampled.token_ids[:2] == [12, 11]
    assert sampled.forced == [True, True, False]
    assert sampled.token_ids[2] == int(logits[2].argmax())


def test_extreme_parameters_stay_in_range():
    logits = noise(1, 400)
    best = int(logits.argmax())
    assert sample(logits, [row(temperature=1e-6, seed=s) for s in range(1)]) == [best]
    assert sample(logits, [row(temperature=1.0, top_p=1e-9)]) == [best]
    assert sample(logits, [row(temperature=1.0, min_p=0.9999999)]) == [best]
    for s in range(20):
        assert 0 <= sample(logits, [row(temperature=2.0, top_k=10**6, top_p=1.0, seed=2**64 - 1 - s)])[0] < 400
    spike = torch.full((1, 400), -1e30)
    spike[0, 123] = 1e30
    assert sample(spike, [row(temperature=1.0, seed=5)]) == [123]
