"""What the host says to the device sampler: which rows it must keep, and a slot's record at any point of a sequence."""

import numpy as np
import pytest

from expertmesh.cluster.attention.device_sampler import DeviceSampler, decode_flags, record_of
from expertmesh.cluster.attention.sampler import Sampled
from expertmesh.cluster.attention.sequence import Sequence
from expertmesh.kernels.sample import MAX_CLOSING, SLOT
from expertmesh.request import EngineRequest, SamplingParams, ThinkingBudget


def sequence(output=(), thinking=None, **sampling):
    params = SamplingParams(**{"max_tokens": 100, **sampling})
    return Sequence.of(
        EngineRequest(request_id="r", prompt_ids=(4, 2), output_ids=tuple(output), sampling=params, thinking=thinking)
    )


def budget(closing=(5, 8), tokens=3, inside=False):
    return ThinkingBudget(
        budget_tokens=tokens, think_id=7, end_think_id=8, closing_ids=tuple(closing), starts_inside=inside
    )


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "seed": 2**64 - 1},
        {"min_tokens": 5},  # without stop ids nothing is held back
        {"stop_token_ids": frozenset({3})},
        {"thinking": budget()},
        {"min_tokens": 2, "stop_token_ids": frozenset({3}), "output": (1, 1)},  # they have come
    ],
)
def test_the_device_chooses(sampling):
    assert not DeviceSampler.needs_host(sequence(**sampling))


@pytest.mark.parametrize(
    "sampling",
    [
        {"num_logprobs": 0},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
        {"min_tokens": 2, "stop_token_ids": frozenset({3}), "output": (1,)},
        {"thinking": budget(closing=range(MAX_CLOSING + 1))},
    ],
)
def test_the_host_chooses(sampling):
    assert DeviceSampler.needs_host(sequence(**sampling))


def test_a_grammar_is_the_hosts():
    row = sequence()
    row.grammar = object()
    assert DeviceSampler.needs_host(row)


def test_a_record_is_the_sequence_where_the_host_knows_it_to_be():
    row = sequence(output=(7, 1, 1), thinking=budget(), temperature=0.5, top_p=0.9, min_p=0.25, top_k=3, seed=2**64 - 1)
    record = record_of(6, row)
    assert record.nbytes == SLOT.itemsize
    got = {name: record[name].item() for name in SLOT.names if record[name].ndim == 0}
    assert got == {
        "temperature": 0.5,
        "top_p": 0.9,
        "min_p": 0.25,
        "seed": 2**64 - 1,
        "position": 3,
        "last_token": 1,
        "slot": 6,
        "top_k": 3,
        "has_thinking": 1,
        "think_id": 7,
        "end_think_id": 8,
        "budget": 3,
        "inside": 1,
        "num_spent": 3,
        "cursor": 0,  # three tokens inside are spent: the closing sentence begins
        "num_closing": 2,
    }
    assert record["closing"][:3].tolist() == [5, 8, 0]


def test_without_thinking_nothing_is_forced():
    record = record_of(0, sequence())
    assert (int(record["has_thinking"]), int(record["cursor"]), int(record["num_closing"])) == (0, -1, 0)
    assert int(record["last_token"]) == 2  # of the prompt


def test_flags_come_back_as_the_hosts_sampler_has_them():
    finite, forced = decode_flags(np.array([0, 1, 2, 3], np.uint8))
    sampled = Sampled([1, 2, 3, 4], forced, finite, [None] * 4)
    assert (sampled.finite, sampled.forced) == ([False, True, False, True], [False, False, True, True])
