"""Which questions there are and how often: one turn of any simple kind, and conversations made of turns.

Why plain templates: many wordings of each question, one fixed way to think about it, one short answer. The wordings are
what a person would type, now and then carelessly; the ways to think are lines that a small model can follow."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from .calendar_questions import date, month, unit, weekday
from .lists import compare, count_all_letters, count_items, count_letters, sort_numbers, sort_words
from .memory import memory_item, system_message
from .small_talk import elsewhere, greeting
from .sums import addition, division, multiplication, series, subtraction, word_problem
from .tasks import Item, Maker, Turn
from .tools import CALCULATOR, WEATHER, calculator, missing_tool, weather

Random = random.Random
TurnMaker = Callable[[Random, bool], Turn]

SIMPLE = (
    (addition, 22), (subtraction, 24), (division, 5), (compare, 3), (count_all_letters, 3), (unit, 2),
    (multiplication, 14), (series, 7), (sort_numbers, 12), (sort_words, 5),
    (count_letters, 9), (count_items, 5), (weekday, 6), (month, 4), (date, 5), (word_problem, 9), (greeting, 3),
    (elsewhere, 3),
)  # fmt: skip
_SIMPLE_MAKERS = tuple(maker for maker, _ in SIMPLE)
_SIMPLE_WEIGHTS = tuple(weight for _, weight in SIMPLE)
_UNVARIED = (word_problem, greeting, elsewhere)  # names and fixed phrases keep their form
_OPENINGS = ("Please: ", "Hi! ", "Hey, ", "Can you help me? ", "Quick question: ", "OK, ", "Now ", "And ", "Next: ")


def simple_turn(rng: Random, held_out: bool) -> Turn:
    """One turn of any task that needs neither memory nor tools, sometimes carelessly typed."""
    maker = rng.choices(_SIMPLE_MAKERS, _SIMPLE_WEIGHTS)[0]
    turn = maker(rng, held_out)
    return turn if maker in _UNVARIED or rng.random() < 0.7 else replace(turn, user=_careless(rng, turn.user))


def _careless(rng: Random, text: str) -> str:
    how = rng.randrange(3)
    if how == 0:
        return text[0].lower() + text[1:]
    return text.rstrip(".?。？") if how == 1 else rng.choice(_OPENINGS) + text[0].lower() + text[1:]


def memory(rng: Random, held_out: bool) -> Item:
    return memory_item(rng, held_out, simple_turn)


def tool_item(rng: Random, held_out: bool) -> Item:
    """A conversation with tools in the system message: tool turns, and others that need none."""
    if rng.random() < 0.08:
        return Item(task="tool", turns=(missing_tool(rng, held_out),), system=system_message(rng))
    tools = [CALCULATOR] if rng.random() < 0.5 else rng.sample([CALCULATOR, WEATHER], 2)
    makers = [calculator, calculator, weather] if len(tools) == 2 else [calculator]
    turns = [rng.choice(makers)(rng, held_out) for _ in range(rng.randint(1, 2))]
    scored = list(range(len(turns)))
    if rng.random() < 0.35:
        position = rng.randint(0, len(turns))
        turns.insert(position, simple_turn(rng, held_out))
        scored = [index + (index >= position) for index in scored]
    return Item(task="tool", turns=tuple(turns), system=system_message(rng), tools=tuple(tools), scored=tuple(scored))


def mixed(rng: Random, held_out: bool) -> Item:
    """Everything in one conversation: facts, questions, a tool now and then, and the facts again."""
    base = memory(rng, held_out)
    turns = list(base.turns)
    turns.insert(rng.randint(1, len(turns)), simple_turn(rng, held_out))
    turns.insert(rng.randint(1, len(turns)), calculator(rng, held_out))
    tools = (CALCULATOR,) if rng.random() < 0.6 else (CALCULATOR, WEATHER)
    return Item(task="mixed", turns=tuple(turns), system=base.system, tools=tools, scored=(len(turns) - 1,))


def _one(maker: TurnMaker, task: str) -> Maker:
    def make(rng: Random, held_out: bool) -> Item:
        return Item(task=task, turns=(maker(rng, held_out),), system=system_message(rng))

    return make


def _either(*makers: TurnMaker) -> TurnMaker:
    return lambda rng, held_out: rng.choice(makers)(rng, held_out)


def _four_digits(maker: Callable[[Random, bool, tuple[int, int]], Turn]) -> TurnMaker:
    return lambda rng, held_out: maker(rng, held_out, (4, 4))


MAKERS: dict[str, Maker] = {
    "add": _one(addition, "add"),
    "subtract": _one(subtraction, "subtract"),
    "add4": _one(_four_digits(addition), "add4"),
    "subtract4": _one(_four_digits(subtraction), "subtract4"),
    "multiply": _one(multiplication, "multiply"),
    "divide": _one(division, "divide"),
    "series": _one(series, "series"),
    "sort": _one(_either(sort_numbers, sort_numbers, sort_words, compare), "sort"),
    "count": _one(_either(count_letters, count_items, count_all_letters), "count"),
    "calendar": _one(_either(weekday, month, date, weekday, month, date, unit), "calendar"),
    "word problem": _one(word_problem, "word problem"),
    "greeting": _one(_either(greeting, greeting, elsewhere), "greeting"),
    "memory": memory,
    "tool": tool_item,
    "mixed": mixed,
}
