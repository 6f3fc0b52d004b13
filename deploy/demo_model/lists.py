"""Questions about lists and letters: sort numbers, sort words, count letters, count entries."""

from __future__ import annotations

import random

from . import words
from .sums import draw_operand, number_check
from .tasks import Check, Turn

Random = random.Random


def sort_numbers(rng: Random, held_out: bool) -> Turn:
    top = 99 if rng.random() < 0.7 else 999
    numbers = rng.sample(range(1, top + 1), rng.randint(3, 7))
    descending = rng.random() < 0.3
    templates: tuple[str, ...]
    if descending:
        templates = (
            "Sort from largest to smallest: {l}",
            "Sort {l} in descending order.",
            "Order {l} from high to low.",
        )
    else:
        templates = (
            "Sort these numbers: {l}", "Sort {l}", "Put these numbers in order: {l}",
            "Sort from smallest to largest: {l}",
            "Sort {l} in ascending order.", "Order {l} from low to high.",
        )  # fmt: skip
    user = rng.choice(templates).format(l=_listed(rng, [str(number) for number in numbers]))
    order = sorted(numbers, reverse=descending)
    thinking = _selection([str(n) for n in numbers], [str(n) for n in order], "max" if descending else "min")
    answer = ", ".join(map(str, order))
    return Turn(
        user=user,
        thinking=thinking,
        answer=answer,
        check=Check(kind="numbers", value=tuple(map(str, order))),
        task="sort",
    )


def sort_words(rng: Random, held_out: bool) -> Turn:
    chosen = rng.sample(words.ITEMS, rng.randint(3, 5))
    templates = ("Sort these words: {l}", "Sort alphabetically: {l}", "Put these words in alphabetical order: {l}")
    user = rng.choice(templates).format(l=_listed(rng, chosen))
    order = sorted(chosen)
    thinking = _selection(chosen, order, "first")
    check = Check(kind="words", value=tuple(order), choices=words.ITEMS)
    return Turn(user=user, thinking=thinking, answer=", ".join(order), check=check, task="sort")


def count_letters(rng: Random, held_out: bool) -> Turn:
    word = "strawberry" if rng.random() < 0.03 else rng.choice(words.SPELLING)
    letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    quoted = rng.random() < 0.5
    shown = (f'"{letter}"', f'"{word}"') if quoted else (letter, word)
    templates = (
        "How many times does the letter {c} appear in {w}?", "How many {c} are in {w}?", "Count the letter {c} in {w}.",
        "How many {c}'s are in the word {w}?", "How often is {c} in {w}?",
    )  # fmt: skip
    user = rng.choice(templates).format(c=shown[0], w=shown[1])
    marks, count = [], 0
    for character in word:
        count += character == letter
        marks.append(f"{character} {count}" if character == letter else character)
    answer = f"The letter {letter} appears {count} time{'' if count == 1 else 's'} in {word}."
    return Turn(
        user=user, thinking=", ".join(marks) + f"\n= {count}", answer=answer, check=number_check(count), task="count"
    )


def count_items(rng: Random, held_out: bool) -> Turn:
    kinds = rng.sample(words.ITEMS, rng.randint(2, 4))
    entries = [rng.choice(kinds) for _ in range(rng.randint(3, 10))]
    listed = ", ".join(entries)
    if rng.random() < 0.6:
        wanted = rng.choice(kinds)
        user = rng.choice(
            ("How many times does {w} appear in this list: {l}?", "Count {w} in: {l}", "How often is {w} in {l}?")
        ).format(w=wanted, l=listed)
        marks, count = [], 0
        for entry in entries:
            count += entry == wanted
            marks.append(f"{entry} {count}" if entry == wanted else entry)
        answer = f"{wanted} appears {count} time{'' if count == 1 else 's'}."
    else:
        user = rng.choice(
            ("How many words are in this list: {l}?", "Count the words: {l}", "How long is the list {l}?")
        )
        user = user.format(l=listed)
        count = len(entries)
        marks = [f"{entry} {index + 1}" for index, entry in enumerate(entries)]
        answer = f"The list has {count} words."
    return Turn(
        user=user, thinking=", ".join(marks) + f"\n= {count}", answer=answer, check=number_check(count), task="count"
    )


def compare(rng: Random, held_out: bool) -> Turn:
    a, b = draw_operand(rng, 5), draw_operand(rng, 5)
    if rng.random() < 0.3:
        b = max(0, a + rng.randint(-20, 20))
    b = b + 1 if a == b else b
    greater = rng.random() < 0.6
    word = rng.choice(("bigger", "larger", "greater") if greater else ("smaller", "less"))
    user = rng.choice(("Which is {w}, {a} or {b}?", "Which number is {w}: {a} or {b}?", "What is {w}, {a} or {b}?"))
    right = max(a, b) if greater else min(a, b)
    thinking = f"{a} {'>' if a > b else '<'} {b}"
    return Turn(
        user=user.format(w=word, a=a, b=b), thinking=thinking, answer=f"{right} is {word}.", check=number_check(right),
        task="sort",
    )  # fmt: skip


def count_all_letters(rng: Random, held_out: bool) -> Turn:
    word = rng.choice(words.SPELLING)
    user = rng.choice(("How many letters are in {w}?", "How many letters does {w} have?", "How long is the word {w}?"))
    shown = f'"{word}"' if rng.random() < 0.3 else word
    thinking = ", ".join(f"{character} {index + 1}" for index, character in enumerate(word))
    return Turn(
        user=user.format(w=shown), thinking=f"{thinking}\n= {len(word)}", answer=f"{word} has {len(word)} letters.",
        check=number_check(len(word)), task="count",
    )  # fmt: skip


def _listed(rng: Random, entries: list[str]) -> str:
    how = rng.random()
    if how < 0.75:
        return ", ".join(entries)
    return " ".join(entries) if how < 0.88 else f"{', '.join(entries[:-1])} and {entries[-1]}"


def _selection(left: list[str], order: list[str], label: str) -> str:
    lines = [", ".join(left)]
    for chosen in order:
        left = [entry for entry in left if entry != chosen]
        lines.append(f"{label} {chosen}" + (f", left {', '.join(left)}" if left else ""))
    return "\n".join(lines)
