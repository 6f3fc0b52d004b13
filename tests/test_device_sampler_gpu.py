"""The device sampler against the host's: the same uniforms, the same draws, the same thinking, token by token."""

import random

import numpy as np
import pytest
import torch

from expertmesh.cluster.attention import draw as host_draw
from expertmesh.cluster.attention.device_sampler import DeviceSampler, decode_flags
from expertmesh.cluster.attention.sequence import Sequence
from expertmesh.cluster.attention.thinking import ThinkingState
from expertmesh.kernels.sample import uniforms
from expertmesh.request import EngineRequest, SamplingParams, ThinkingBudget

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
DEVICE = "cuda"
NAN, INF = float("nan"), float("inf")
QWEN = (151669, 151936)  # ids of the tokenizer, columns of the head


def sequence(thinking=None, output=(), **sampling):
    params = SamplingParams(**{"max_tokens": 1000, **sampling})
    return Sequence.of(
        EngineRequest(request_id="r", prompt_ids=(1, 2), output_ids=tuple(output), sampling=params, thinking=thinking)
    )


def admitted(vocab_size, sequences, max_num_seqs=0):
    sampler = DeviceSampler(vocab_size, max_num_seqs or len(sequences), DEVICE)
    for slot, one in enumerate(sequences):
        sampler.admit(slot, one)
    sampler.upload()
    return sampler


def slots_of(*slots):
    return torch.tensor(slots, dtype=torch.int32, device=DEVICE)


def sample(sampler, logits, slots=None):
    """-> ids, finite, forced as lists; logits on the CPU."""
    slots = torch.arange(logits.shape[0], dtype=torch.int32, device=DEVICE) if slots is None else slots
    ids, flags = sampler.sample(logits.to(DEVICE), slots)
    return ids.tolist(), *decode_flags(flags.cpu().numpy())


def noise(rows, vocab, seed=0, scale=3.0, dtype=torch.bfloat16):
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


# ------------------------------------------------------------------------------------------------------------- greedy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("vocab", "columns"), [(1, 1), (11, 13), (256, 256), (300, 304), (2112, 2112), QWEN])
def test_greedy_takes_the_lowest_id_among_ties_and_no_padding(vocab, columns, dtype):
    logits = noise(5, columns, dtype=dtype)
    logits[:, vocab:] = INF
    peak = float(logits[:, :vocab].max()) + 1
    logits[1, vocab // 2] = logits[1, vocab - 1] = peak
    logits[2, :vocab] = -0.0
    logits[2, vocab // 3] = 0.0  # equal to -0
    logits[3, : vocab - 1] = -INF
    ids, finite, forced = sample(admitted(vocab, [sequence() for _ in range(5)]), logits)
    assert ids == logits[:, :vocab].float().numpy().argmax(1).tolist()
    assert ids[1] == vocab // 2
    assert finite == [True] * 5
    assert forced == [False] * 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_flagged_and_spoils_no_other(temperature):
    vocab = 5000
    logits = noise(6, vocab)
    clean = logits.clone()
    logits[1, 4321] = NAN
    logits[2, 17] = INF
    logits[3] = -INF
    logits[4, 100:200] = -INF  # a few of them are no harm
    rows = [sequence(temperature=temperature, top_p=0.9, seed=i) for i in range(6)]
    ids, finite, _ = sample(admitted(vocab, rows), logits)
    assert finite == [True, False, False, False, True, True]
    expected = sample(admitted(vocab, rows), clean)[0]
    assert [ids[0], ids[5]] == [expected[0], expected[5]]


def test_padding_rows_move_no_slot():
    sampler = admitted(300, [sequence(temperature=1.0, seed=9) for _ in range(3)])
    before = sampler.state.clone()
    ids, finite, _ = sample(sampler, noise(4, 300), slots_of(-1, 1, -1, -1))
    assert finite == [False, True, False, False]
    changed = (sampler.state != before).any(1).tolist()
    assert changed == [False, True, False]
    assert int(sampler.last_token[1]) == ids[1]
    assert sampler.last_token[[0, 2]].tolist() == [2, 2]  # of the prompt


# -------------------------------------------------------------------------------------------------------------- draws
def test_uniforms_are_the_hosts_bit_for_bit():
    generator = np.random.default_rng(0)
    ends = np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64)
    seeds = np.concatenate([generator.integers(0, 2**64, 5000, dtype=np.uint64), ends])
    positions = np.concatenate([generator.integers(0, 2**20, 5000, dtype=np.uint64), ends[::-1]])
    got = uniforms(*(torch.from_numpy(a.view(np.int64)).to(DEVICE) for a in (seeds, positions)))
    assert np.array_equal(got.cpu().numpy(), host_draw.uniforms(seeds, positions))


RULES = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 20, "top_p": 0.95, "temperature": 0.6},
    {"top_k": 300},
    {"top_k": 5000},  # more than are sorted
    {"top_k": 5000, "top_p": 0.9, "temperature": 3.0},
    {"top_p": 0.7},
    {"top_p": 0.999},  # keeps many
    {"top_p": 0.95, "temperature": 4.0},
    {"min_p": 0.1},
    {"min_p": 0.0005, "temperature": 2.0},
    {"min_p": 0.02, "top_p": 0.97, "temperature": 2.0},
    {"temperature": 1.2, "top_k": 8, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.01},
]


def shaped(kind, rows, vocab, dtype):
    logits = noise(rows, vocab, dtype=dtype)
    if kind == "equal":
        logits[:] = 1.5
    elif kind == "two values":
        logits = torch.where(logits > 2, 3.0, 1.0).to(dtype)
    elif kind == "together":  # the best all in one place
        width = min(700, vocab)
        logits[:, :width] = (20 + noise(rows, width, seed=5, scale=0.5).float()).to(dtype)
    elif kind == "masked":
        logits[:, 1::2] = -INF
    return logits


def host_ids(logits, sequences, uniform_factor=1.0, top_p_factor=1.0, temperature_factor=1.0):
    """draw.py's, with its numbers a little moved."""
    original = host_draw._Rules.of

    def moved(sequences, device):
        rules = original(sequences, device)
        return host_draw._Rules(
            temperature=rules.temperature * temperature_factor,
            top_k=rules.top_k,
            top_p=torch.where(rules.top_p < 1, rules.top_p * top_p_factor, rules.top_p),
            min_p=rules.min_p * (2 - temperature_factor),
            uniform=(rules.uniform * uniform_factor).clamp(max=1 - 2**-53),
        )

    host_draw._Rules.of = staticmethod(moved)
    try:
        return host_draw.draw(logits, sequences).tolist()
    finally:
        host_draw._Rules.of = original


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["noise", "equal", "two values", "together", "masked"])
@pytest.mark.parametrize("vocab", [11, 300, 5000, 151669])
def test_draws_are_the_hosts_but_for_ties_of_floats(vocab, kind, dtype):
    rows = [
        sequence(**{"temperature": 1.0, "seed": 31 * i + j, **rule}) for i in range(3) for j, rule in enumerate(RULES)
    ]
    rows = [r if r.request.sampling.top_k <= vocab else sequence(temperature=1.0, top_k=vocab, seed=1) for r in rows]
    logits = shaped(kind, len(rows), vocab, dtype)
    ids, finite, _ = sample(admitted(vocab, rows), logits)
    assert all(finite)
    expected = host_ids(logits.float(), rows)
    wrong = [i for i, (got, wanted) in enumerate(zip(ids, expected)) if got != wanted]
    assert len(wrong) <= 1 + 0.02 * len(rows)
    for i in wrong:  # a sum rounded otherwise crosses the border: a host that is moved by a millionth goes there too
        near = {
            host_ids(logits[i : i + 1].float(), [rows[i]], 1 + a, 1 + b, 1 + c)[0]
            for a in (-2e-6, -2e-7, 0, 2e-7, 2e-6)
            for b in (-2e-6, 0, 2e-6)
            for c in (-1e-6, 0, 1e-6)
        }
        assert ids[i] in near, (rows[i].request.sampling, ids[i], expected[i])


def test_a_draw_depends_on_seed_and_position_alone():
    vocab = 5000
    logits = noise(1, vocab)
    many = logits.expand(40, -1).contiguous()
    rows = [sequence(temperature=1.0, seed=5, output=[3] * n) for n in range(40)]
    together = sample(admitted(vocab, rows), many)[0]
    alone = [sample(admitted(vocab, [r]), logits)[0][0] for r in rows]
    assert together == alone
    assert len(set(together)) > 10
    sampler = admitted(vocab, rows[:1])
    one_after_another = [sample(sampler, logits)[0][0] for _ in range(40)]  # the position moves on by itself
    assert one_after_another == together


def test_draws_follow_the_distribution():
    vocab, count = 8, 4000
    logits = noise(1, vocab, scale=1.0)
    rows = [sequence(temperature=1.0, seed=s) for s in range(count)]
    ids = sample(admitted(vocab, rows), logits.expand(count, -1).contiguous())[0]
    expected = torch.softmax(logits.float(), -1)[0].numpy() * count
    observed = np.bincount(ids, minlength=vocab)
    assert ((observed - expected) ** 2 / expected).sum() < 30  # chi-square, 7 degrees of freedom


# ----------------------------------------------------------------------------------------------------------- thinking
THINK, END = 7, 8


def budgets():
    for budget in range(9):
        for closing in ((), (5, END), (5, 6, END, 5), (3,), (END,)):
            for inside in (False, True):
                yield ThinkingBudget(
                    budget_tokens=budget, think_id=THINK, end_think_id=END, closing_ids=closing, starts_inside=inside
                )


@pytest.mark.parametrize("in_graph", [False, True])
def test_the_thinking_fold_is_the_hosts_token_by_token(in_graph):
    vocab, steps = 12, 40
    every = list(budgets())
    generator = random.Random(3)
    histories = [[generator.randrange(vocab) for _ in range(generator.randrange(6))] for _ in every]
    hosts = []
    for budget, history in zip(every, histories):
        state = ThinkingState(budget)
        for token_id in history:
            state.accept(token_id)
        hosts.append(state)
    sampler = admitted(vocab, [sequence(thinking=b, output=h) for b, h in zip(every, histories)])
    logits = torch.zeros(len(every), vocab, device=DEVICE)
    slots = torch.arange(len(every), dtype=torch.int32, device=DEVICE)
    if in_graph:
        saved = sampler.state.clone()
        sampler.sample(logits, slots)  # loads the kernels
        sampler.state.copy_(saved)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = sampler.sample(logits, slots)
    for _ in range(steps):
        wanted = [generator.choice([THINK, END, *range(vocab)]) for _ in every]
        chosen = torch.full((len(every), vocab), -1.0)
        chosen[range(len(every)), wanted] = 1.0
        logits.copy_(chosen)
        if in_graph:
            graph.replay()
        else:
            outputs = sampler.sample(logits, slots)
        ids = outputs[0].tolist()
        forced = decode_flags(outputs[1].cpu().numpy())[1]
        for host, want, got, is_forced in zip(hosts, wanted, ids, forced):
            assert is_forced == (host.forced_id is not None)
            assert got == (want if host.forced_id is None else host.forced_id)
            host.accept(got)
        assert sampler.last_token.tolist() == ids


def test_a_step_run_again_after_admitting_again_gives_the_same_tokens():
    vocab = 2112
    budget = ThinkingBudget(budget_tokens=2, think_id=THINK, end_think_id=END, closing_ids=(5, END), starts_inside=True)
    rows = [sequence(temperature=0.8, seed=3, thinking=budget), sequence(temperature=1.0, top_p=0.9, seed=4)]
    sampler = admitted(vocab, rows, max_num_seqs=8)
    logits = noise(2, vocab)
    first = sample(sampler, logits)
    sample(sampler, noise(2, vocab, seed=1))  # a step ahead of it, which is void too
    for slot, row in enumerate(rows):
        sampler.admit(slot, row)
    sampler.upload()
    assert sample(sampler, logits) == first


def test_many_uploads_reuse_their_buffers_in_order():
    sampler = DeviceSampler(100, 3, DEVICE)
    for n in range(1, 20):
        for slot in range(3):
            sampler.admit(slot, sequence(output=[n + slot]))
        sampler.release(2)
        sampler.upload()
        assert sampler.last_token.tolist() == [n, n + 1, 0]


def test_draws_in_a_graph_are_those_outside():
    vocab, columns = QWEN
    rows = [
        sequence(**{"temperature": 1.0, "seed": j, **rule}) for j, rule in enumerate([*RULES, {"temperature": 0.0}])
    ]
    logits = noise(len(rows), columns).to(DEVICE)
    slots = torch.arange(len(rows), dtype=torch.int32, device=DEVICE)
    eager, captured = admitted(vocab, rows), admitted(vocab, rows)
    expected = [eager.sample(logits, slots)[0].tolist() for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, flags = captured.sample(logits, slots)
    got = []
    for _ in range(3):
        graph.replay()
        got.append(ids.tolist())
    assert got == expected
    assert decode_flags(flags.cpu().numpy())[0] == [True] * len(rows)
