"""The thinking budget is exact to the token, and a fold over accepted tokens alone."""

import random

import pytest

from expertmesh.cluster.attention.thinking import ThinkingState
from expertmesh.request import ThinkingBudget

THINK, END, NEWLINE, CLOSING = 100, 101, 10, (50, 51, 101, 52)


def budget(tokens: int, *, inside: bool = False) -> ThinkingBudget:
    return ThinkingBudget(
        budget_tokens=tokens, think_id=THINK, end_think_id=END, closing_ids=CLOSING, starts_inside=inside
    )


def generate(state: ThinkingState, model: list[int], count: int) -> list[int]:
    """`count` tokens of a model that would say `model`; forced ones come in between."""
    out, words = [], iter(model)
    while len(out) < count:
        token = state.forced_id
        out.append(next(words) if token is None else token)
        state.accept(out[-1])
    return out


@pytest.mark.parametrize("tokens", range(1, 65))
def test_opener_and_newline_count_and_the_closing_comes_at_the_budget(tokens):
    words = [THINK, NEWLINE, *range(200, 400)]
    out = generate(ThinkingState(budget(tokens)), words, 100)
    assert out == [*words[:tokens], *CLOSING, *words[tokens : 100 - 4]]


@pytest.mark.parametrize("tokens", range(65))
def test_prompt_that_opened_the_block_counts_generated_tokens_only(tokens):
    words = list(range(200, 400))
    out = generate(ThinkingState(budget(tokens, inside=True)), words, 100)
    assert out == [*words[:tokens], *CLOSING, *words[tokens : 100 - 4]]


def test_zero_budget_closes_right_after_an_opener():
    assert generate(ThinkingState(budget(0)), [THINK, 7, 8], 7) == [THINK, *CLOSING, 7, 8]


@pytest.mark.parametrize("length", range(1, 9))
def test_block_that_ends_within_the_budget_is_left_alone(length):
    words = [THINK, *range(200, 198 + length), END, *range(300, 340)] if length > 1 else [THINK, END, *range(300, 340)]
    spent = words.index(END) + 1
    out = generate(ThinkingState(budget(spent)), words, 30)
    assert out == words[:30]
    out = generate(ThinkingState(budget(spent - 1)), words, 30)
    assert out[: spent - 1 + 4] == [*words[: spent - 1], *CLOSING]


def test_no_block_no_budget():
    words = list(range(200, 260))
    state = ThinkingState(budget(3))
    assert generate(state, words, 60) == words
    assert state.num_spent == 0


def test_second_block_goes_on_with_the_same_count():
    words = [THINK, 1, END, 2, THINK, 3, 4, 5, 6]
    assert generate(ThinkingState(budget(5)), words, 12) == [THINK, 1, END, 2, THINK, 3, *CLOSING, 4, 5]


def test_block_opened_after_the_budget_is_spent_is_closed_at_once():
    words = [THINK, 1, 2, THINK, 3, 4]
    assert generate(ThinkingState(budget(2)), words, 12) == [THINK, 1, *CLOSING, 2, THINK, *CLOSING]


def test_closing_sentence_may_hold_any_id():
    odd = ThinkingBudget(budget_tokens=2, think_id=THINK, end_think_id=END, closing_ids=(END, THINK, 7, END, 8))
    state = ThinkingState(odd)
    assert generate(state, [THINK, *range(200, 260)], 12) == [THINK, 200, *odd.closing_ids, *range(201, 206)]
    assert not state.inside


def test_replay_of_any_prefix_reaches_the_same_state():
    rng = random.Random(5)
    for _ in range(200):
        tokens, inside = rng.randrange(12), rng.random() < 0.5
        words = [rng.choice([THINK, END, 1, 2, 3]) for _ in range(60)]
        state = ThinkingState(budget(tokens, inside=inside))
        out = generate(state, words, 40)
        cut = rng.randrange(40)
        replayed = ThinkingState(budget(tokens, inside=inside))
        for token in out[:cut]:
            replayed.accept(token)
        live = ThinkingState(budget(tokens, inside=inside))
        generate(live, words, cut)
        for name in ThinkingState.__slots__:
            if name != "budget":
                assert getattr(replayed, name) == getattr(live, name)
        assert replayed.forced_id == live.forced_id


def test_never_more_than_the_budget_is_sampled_inside():
    rng = random.Random(6)
    for _ in range(300):
        tokens = rng.randrange(10)
        state = ThinkingState(budget(tokens, inside=True))
        sampled_inside = 0
        for _ in range(50):
            if state.forced_id is not None:
                state.accept(state.forced_id)
                continue
            was_inside = state.inside
            token = rng.choice([THINK, END, 1, 2])
            state.accept(token)
            # An opener outside the block is the one token that may come when the budget is spent already.
            sampled_inside += was_inside
            assert sampled_inside <= tokens
