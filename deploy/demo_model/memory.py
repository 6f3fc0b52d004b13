"""Conversations in which the user tells facts and asks for them later."""

from __future__ import annotations

import random
from collections.abc import Callable

from . import arithmetic, words
from .sums import number_check
from .tasks import Check, Item, Turn

Random = random.Random


FACTS = {  # kind: (statements, questions, how it is thought of, answer, closed list)
    "name": (("My name is {v}.", "I am {v}.", "Call me {v}.", "I'm {v}."),
             ("What is my name?", "What's my name?", "Who am I?", "Do you remember my name?"),
             "The user's name is {v}.", "Your name is {v}.", words.NAMES),
    "colour": (("My favourite colour is {v}.", "I like the colour {v}.", "My favorite color is {v}."),
               ("What is my favourite colour?", "Which colour do I like?", "What's my favorite color?"),
               "The user's favourite colour is {v}.", "Your favourite colour is {v}.", words.COLOURS),
    "city": (("I live in {v}.", "My home is in {v}.", "I am from {v}."),
             ("Where do I live?", "Which city do I live in?", "Where am I from?"),
             "The user lives in {v}.", "You live in {v}.", words.CITIES),
    "pet": (("I have a {v}.", "My pet is a {v}."), ("What pet do I have?", "What animal do I have?", "What is my pet?"),
            "The user has a {v}.", "You have a {v}.", words.PETS),
    "food": (("My favourite food is {v}.", "I love {v}."), ("What is my favourite food?", "What food do I love?"),
             "The user's favourite food is {v}.", "Your favourite food is {v}.", words.FOODS),
    "number": (("My number is {v}.", "My lucky number is {v}.", "Remember the number {v}."),
               ("What is my number?", "What's my lucky number?", "Which number did I tell you?"),
               "The user's number is {v}.", "Your number is {v}.", ()),
    "名字": (("我叫{v}。", "我的名字是{v}。"), ("我叫什么名字？", "我的名字是什么？", "我是谁？"),
           "用户的名字是{v}。", "你的名字是{v}。", words.CHINESE_NAMES),
    "颜色": (("我最喜欢的颜色是{v}。", "我喜欢{v}。"), ("我最喜欢的颜色是什么？", "我喜欢什么颜色？"),
           "用户最喜欢的颜色是{v}。", "你最喜欢的颜色是{v}。", words.CHINESE_COLOURS),
}  # fmt: skip


def memory_item(rng: Random, held_out: bool, between: Callable[[Random, bool], Turn]) -> Item:
    """Facts told in one or two turns, other questions (`between`) after them, then the questions for the facts."""
    chinese = rng.random() < 0.15
    kinds = rng.sample(
        [kind for kind in FACTS if (kind in ("名字", "颜色")) == chinese], rng.randint(1, 2 if chinese else 3)
    )
    values = {kind: _fact_value(rng, kind) for kind in kinds}
    turns = [_tell(rng, {kind: values[kind]}) for kind in kinds] if rng.random() < 0.4 else [_tell(rng, values)]
    length = rng.random()
    for _ in range(rng.randint(0, 2) if length < 0.9 else rng.randint(3, 6) if length < 0.985 else rng.randint(8, 24)):
        turns.insert(rng.randint(1, len(turns)), between(rng, held_out))
    if rng.random() < 0.12:
        kind = rng.choice(kinds)
        values[kind] = _fact_value(rng, kind)
        turns.append(_tell(rng, {kind: values[kind]}, again=True))
    scored = []
    for kind in rng.sample(kinds, rng.randint(1, len(kinds))):
        turns.append(_recall(rng, kind, values[kind], held_out))
        scored.append(len(turns) - 1)
    missing = [kind for kind in FACTS if kind not in kinds and kind not in ("名字", "颜色")]
    if not chinese and rng.random() < 0.1:
        turns.append(_unknown(rng, rng.choice(missing)))
        scored.append(len(turns) - 1)
    return Item(task="memory", turns=tuple(turns), system=system_message(rng), scored=tuple(scored))


def _fact_value(rng: Random, kind: str) -> str:
    if kind == "name" and rng.random() < 0.4:
        return _made_name(rng)
    return str(rng.randint(1, 99)) if kind == "number" else rng.choice(FACTS[kind][4])


def _made_name(rng: Random) -> str:
    """A name of no list, so that names are copied from the conversation and not known by heart."""
    syllables = (
        rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") + rng.choice(("", "", "n", "l", "r")) for _ in "ab"
    )
    name = "".join(syllables) + rng.choice(("", "a", "ia", "na", "s", "ro"))
    return rng.choice(("", "So", "An", "El", "Mi")) + name if rng.random() < 0.2 else name.capitalize()


def _tell(rng: Random, values: dict[str, str], again: bool = False) -> Turn:
    chinese = next(iter(values)) in ("名字", "颜色")
    text = ("" if chinese else " ").join(rng.choice(FACTS[kind][0]).format(v=value) for kind, value in values.items())
    if not again and not chinese and rng.random() < 0.2:
        text = rng.choice(("Hello, ", "Hi! ", "Hey, ", "Good morning. ")) + text
    if again:
        text = (
            f"其实，{text}"
            if chinese
            else rng.choice(("Actually, {t}", "Correction: {t}", "No wait. {t}")).format(t=text)
        )
    name = values.get("名字") if chinese else values.get("name")
    if chinese:
        answer, thinking = f"好的{'，' + name if name else ''}，我记住了。", "用户告诉我一些事。"
    else:
        answer, thinking = (
            (f"Nice to meet you, {name}!" if name else "Okay, I will remember that."),
            "The user tells me facts.",
        )
    return Turn(user=text, thinking=thinking, answer=answer, check=Check(kind="phrase", value=(answer,)), task="memory")


def _recall(rng: Random, kind: str, value: str, held_out: bool) -> Turn:
    _, questions, thought, answer, choices = FACTS[kind]
    if kind == "number" and rng.random() < 0.4:
        other = rng.randint(1, 99)
        user = rng.choice(("Add {n} to my number.", "What is my number plus {n}?")).format(n=other)
        total = int(value) + other
        thinking = f"{thought.format(v=value)}\n{arithmetic.add(int(value), other)}"
        return Turn(
            user=user,
            thinking=thinking,
            answer=f"{value} + {other} = {total}.",
            check=number_check(total),
            task="memory",
        )
    check = Check(kind="words", value=(value,), choices=choices)
    if kind == "number":
        check = number_check(int(value))
    elif value not in choices:
        check = Check(kind="phrase", value=(f" {value}.",))
    user = rng.choice(questions)
    return Turn(user=user, thinking=thought.format(v=value), answer=answer.format(v=value), check=check, task="memory")


def _unknown(rng: Random, kind: str) -> Turn:
    answer = "I do not know that yet."
    user, thinking = rng.choice(FACTS[kind][1]), "The user has not told me."
    return Turn(
        user=user, thinking=thinking, answer=answer, check=Check(kind="phrase", value=("not know",)), task="memory"
    )


def system_message(rng: Random) -> str:
    """The system message of a conversation; most have none."""
    if rng.random() < 0.65:
        return ""
    return rng.choice(
        (
            "You are a helpful assistant.",
            "You are the expertmesh demo model.",
            "You are a careful assistant.",
            "Be brief.",
        )
    )
