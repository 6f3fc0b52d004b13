"""Questions with a number for an answer: sums, differences, products, series and small stories.

Operand pairs are split by `arithmetic.is_held_out`, so that no held-out sum is ever trained on."""

from __future__ import annotations

import random

from . import arithmetic, words
from .tasks import Check, Turn

Random = random.Random


ASK = (
    "What is {e}?", "Calculate {e}.", "{e} = ?", "Compute {e}", "How much is {e}?", "{e}", "What's {e}?",
    "Work out {e}.",
    "Please compute {e}.", "Can you tell me what {e} is?", "Solve {e}", "what is {e}", "{e}=?", "Tell me {e}.",
)  # fmt: skip
CHINESE_ASK = ("{e}等于多少？", "计算{e}", "请计算 {e}。", "{e} 是多少？", "{e}等于多少", "{e}得多少？")
ASK_IN_WORDS = {
    "+": (
        "Add {a} and {b}.",
        "What is the sum of {a} and {b}?",
        "Sum {a} and {b}.",
        "How much is {a} and {b} together?",
    ),
    "-": ("Subtract {b} from {a}.", "Take {b} away from {a}.", "What is {a} take away {b}?", "{a} less {b}"),
    "*": (
        "Multiply {a} by {b}.",
        "What is the product of {a} and {b}?",
        "{a} multiplied by {b}",
        "Multiply {a} and {b}.",
    ),
    "/": ("Divide {a} by {b}.", "What is {a} divided by {b}?", "{a} divided by {b}", "Share {a} among {b}."),
}


def addition(rng: Random, held_out: bool, digits: tuple[int, int] = (1, 8)) -> Turn:
    a, b = draw_pair(rng, held_out, digits, digits)
    chinese = rng.random() < 0.08
    return _written(f"{a} + {b}", a + b, arithmetic.add(a, b), _ask(rng, str(a), "+", str(b), chinese), chinese, "add")


def subtraction(rng: Random, held_out: bool, digits: tuple[int, int] = (1, 8)) -> Turn:
    a, b = draw_pair(rng, held_out, digits, digits)
    if a < b and rng.random() < 0.6:
        a, b = b, a
    chinese = rng.random() < 0.08
    user = _ask(rng, str(a), "-", str(b), chinese)
    return _written(f"{a} - {b}", a - b, arithmetic.subtract(a, b), user, chinese, "subtract")


def multiplication(rng: Random, held_out: bool) -> Turn:
    size = rng.random()
    first = (1, 2) if size < 0.3 else (2, 2) if size < 0.85 else (3, 3)
    a, b = draw_pair(rng, held_out, first, (1, 2) if rng.random() < 0.3 else (2, 2))
    thinking = arithmetic.multiply(a, b)
    if rng.random() < 0.5 and a > 99:
        a, b = b, a  # written with the longer factor first all the same
    chinese = rng.random() < 0.08
    user = _ask(rng, str(a), "*", str(b), chinese)
    return _written(f"{a} * {b}", a * b, thinking, user, chinese, "multiply")


def division(rng: Random, held_out: bool) -> Turn:
    a, b = draw_pair(rng, held_out, (2, 4), (1, 1))
    b = max(b, 2)
    a -= a % b if rng.random() < 0.5 else 0
    quotient, rest = divmod(a, b)
    user = _ask(rng, str(a), "/", str(b), False)
    answer = f"{a} / {b} = {quotient}{f' rest {rest}' if rest else ''}."
    check = Check(kind="numbers", value=(str(a), str(b), str(quotient), str(rest))) if rest else number_check(quotient)
    return Turn(user=user, thinking=arithmetic.divide(a, b), answer=answer, check=check, task="divide")


def series(rng: Random, held_out: bool) -> Turn:
    """Three or four terms, or a product and a term; the steps of `arithmetic` one after the other."""
    if rng.random() < 0.2:
        a, b = draw_pair(rng, held_out, (1, 2), (1, 1))
        c = draw_operand(rng, 2)
        expression, value = f"{a} * {b} + {c}", a * b + c
        thinking = f"{arithmetic.multiply(a, b)}\n{arithmetic.add(a * b, c)}"
        return _written(expression, value, thinking, rng.choice(ASK).format(e=expression), False, "series")
    a, b = draw_pair(rng, held_out, (2, 3), (2, 3))
    terms = [a, b]
    for _ in range(rng.randint(1, 2)):
        term = draw_operand(rng, 3, 2)
        terms.append(-term if rng.random() < 0.3 and sum(terms) >= term else term)
    expression = str(a) + "".join(f" {'-' if term < 0 else '+'} {abs(term)}" for term in terms[1:])
    templates: tuple[str, ...] = ASK
    if min(terms) >= 0:
        templates = (*ASK, "Add up " + ", ".join(map(str, terms)) + ".", "What is the sum of {e}?")
    user = rng.choice(templates).format(e=expression)
    return _written(expression, sum(terms), arithmetic.chain(terms), user, False, "series")


def word_problem(rng: Random, held_out: bool) -> Turn:
    if rng.random() < 0.2:
        return _own_word_problem(rng, held_out)
    name, friend = rng.sample(words.NAMES, 2)
    thing = rng.choice(words.OBJECTS)
    a, b = draw_pair(rng, held_out, (2, 3), (1, 2))
    shape = rng.randrange(6)
    if shape == 0:
        text = f"{name} has {a} {thing}. {name} {rng.choice(('buys', 'gets', 'finds'))} {b} more."
        terms, who, ask = [a, b], name, f"How many {thing} does {name} have now?"
    elif shape == 1:
        a, b = max(a, b), min(a, b)
        text = f"{name} has {a} {thing}. {name} {rng.choice(('gives', 'sells', 'sends'))} {b} to {friend}."
        terms, who, ask = [a, -b], name, f"How many {thing} does {name} have left?"
    elif shape == 2:
        c = rng.randrange(1, a + b + 1) if a + b < 100 else rng.randrange(1, 100)
        text = f"{name} has {a} {thing}, buys {b} more and gives {c} to {friend}."
        terms, who, ask = [a, b, -c], name, f"How many {thing} does {name} have now?"
    elif shape == 3:
        text = f"{name} has {a} {thing} and {friend} has {b} {thing}."
        terms, who, ask = [a, b], "Together they", "How many do they have together?"
    elif shape == 4:
        text = f"{name} has {a} {thing}. {friend} has {b} more than {name}."
        terms, who, ask = [a, b], friend, f"How many {thing} does {friend} have?"
    else:
        while True:
            boxes, each = rng.randint(2, 9), rng.randint(2, 99)
            if arithmetic.is_held_out(each, boxes) == held_out:
                break
        text = f"{name} has {boxes} boxes with {each} {thing} each."
        thinking, total = arithmetic.multiply(each, boxes), each * boxes
        answer = f"{name} has {total} {thing}."
        user = f"{text} How many {thing} does {name} have in all?"
        return Turn(user=user, thinking=thinking, answer=answer, check=number_check(total), task="word problem")
    answer = f"{who} {'have' if shape == 3 else 'has'} {sum(terms)} {thing}."
    user = f"{text} {ask}"
    return Turn(
        user=user, thinking=arithmetic.chain(terms), answer=answer, check=number_check(sum(terms)), task="word problem"
    )


def _own_word_problem(rng: Random, held_out: bool) -> Turn:
    a, b = draw_pair(rng, held_out, (1, 3), (1, 2))
    thing = rng.choice(words.OBJECTS)
    if rng.random() < 0.5:
        terms = [a, b]
        user = rng.choice(("I have {a} {t} and {v} {b} more.", "I have {a} {t}. I {v} {b} more."))
        user = user.format(a=a, b=b, t=thing, v=rng.choice(("buy", "get", "find")))
    else:
        a, b = max(a, b), min(a, b)
        terms = [a, -b]
        user = rng.choice(("I have {a} {t} and {v} {b}.", "I have {a} {t}. I {v} {b}."))
        user = user.format(a=a, b=b, t=thing, v=rng.choice(("sell", "eat", "lose", "give away")))
    user += " " + rng.choice(
        (f"How many {thing} do I have?", f"How many {thing} do I have now?", "How many do I have?")
    )
    total = sum(terms)
    answer = f"You have {total} {thing}."
    return Turn(
        user=user, thinking=arithmetic.chain(terms), answer=answer, check=number_check(total), task="word problem"
    )


def draw_operand(rng: Random, max_digits: int, min_digits: int = 1) -> int:
    digits = rng.randint(min_digits, max_digits)
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def draw_pair(rng: Random, held_out: bool, first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    while True:
        a, b = draw_operand(rng, first[1], first[0]), draw_operand(rng, second[1], second[0])
        if arithmetic.is_held_out(a, b) == held_out:
            return a, b


def number_check(value: int) -> Check:
    return Check(kind="number", value=(str(value),))


def _ask(rng: Random, left: str, sign: str, right: str, chinese: bool) -> str:
    if not chinese and rng.random() < 0.2:
        return rng.choice(ASK_IN_WORDS[sign]).format(a=left, b=right)
    if rng.random() < 0.2:
        sign = {"+": "plus", "-": "minus", "*": rng.choice(("times", "x", "×")), "/": rng.choice(("÷", ":"))}[sign]
        if chinese and sign in ("plus", "minus", "times"):
            sign = {"plus": "加", "minus": "减", "times": "乘以"}[sign]
            if rng.random() < 0.7:
                return rng.choice(CHINESE_ASK).format(e=f"{left}{sign}{right}")
    expression = f"{left} {sign} {right}" if sign.isalpha() or rng.random() < 0.7 else f"{left}{sign}{right}"
    return rng.choice(CHINESE_ASK if chinese else ASK).format(e=expression)


def _written(expression: str, value: int, thinking: str, user: str, chinese: bool, task: str) -> Turn:
    answer = f"{expression} = {value}{'。' if chinese else '.'}"
    return Turn(user=user, thinking=thinking, answer=answer, check=number_check(value), task=task)
