"""Questions about weekdays, months and dates."""

from __future__ import annotations

import random

from . import arithmetic, words
from .sums import number_check
from .tasks import Check, Turn

Random = random.Random


def weekday(rng: Random, held_out: bool) -> Turn:
    if rng.random() < 0.15:
        return _next_day(rng)
    chinese = rng.random() < 0.2
    days = words.CHINESE_WEEKDAYS if chinese else words.WEEKDAYS
    start, count, back = rng.randrange(7), rng.randint(1, 60), rng.random() < 0.4
    target = days[(start + (-count if back else count)) % 7]
    week, rest = divmod(count, 7)
    step = -1 if back else 1
    walk = [days[(start + step * index) % 7] for index in range(rest + 1)]
    thinking = f"{count} = 7*{week} + {rest}\n{' -> '.join(walk)}"
    if chinese:
        user = rng.choice(("{d}之{w}第{n}天是星期几？", "{d}的{n}天{w}是星期几？", "今天是{d}，{n}天{w}是星期几？"))
        user = user.format(d=days[start], n=count, w="前" if back else "后")
        answer = f"{count}天{'前' if back else '后'}是{target}。"
    else:
        word = "before" if back else "after"
        user = rng.choice(
            (
                "What day is {n} day{s} {w} {d}?", "Which day of the week comes {n} day{s} {w} {d}?",
                "Today is {d}. What day {v} {n} day{s} {x}?", "It is {d}. Which day {v} it {n} day{s} {x}?",
            )
        ).format(
            n=count, s="" if count == 1 else "s", w=word, d=days[start], v="was" if back else "will it be",
            x="ago" if back else "from now",
        )  # fmt: skip
        answer = f"{count} day{'' if count == 1 else 's'} {word} {days[start]} is {target}."
    check = Check(kind="last_word", value=(target,), choices=days)
    return Turn(user=user, thinking=thinking, answer=answer, check=check, task="calendar")


def _next_day(rng: Random) -> Turn:
    start, back = rng.randrange(7), rng.random() < 0.4
    today, target = words.WEEKDAYS[start], words.WEEKDAYS[(start + (-1 if back else 1)) % 7]
    if back:
        templates = (
            "What day was yesterday if today is {d}?",
            "Today is {d}. What day was yesterday?",
            "Which day is before {d}?",
        )
    else:
        templates = (
            "What day is tomorrow if today is {d}?",
            "Today is {d}. What day is tomorrow?",
            "Which day is after {d}?",
        )
    user = rng.choice(templates).format(d=today)
    check = Check(kind="last_word", value=(target,), choices=words.WEEKDAYS)
    return Turn(user=user, thinking=f"{today} -> {target}", answer=f"It is {target}.", check=check, task="calendar")


def unit(rng: Random, held_out: bool) -> Turn:
    count, part, whole = rng.choice(words.UNITS)
    one = f"an {whole}" if whole == "hour" else f"a {whole}"
    templates = ("How many {p} are in {o}?", "How many {p} does {o} have?", "How many {p} are there in one {w}?")
    user = rng.choice(templates).format(p=part, o=one, w=whole)
    answer = f"{one.capitalize()} has {count} {part}."
    thinking = f"{whole}: {count} {part}"
    return Turn(user=user, thinking=thinking, answer=answer, check=number_check(count), task="calendar")


def month(rng: Random, held_out: bool) -> Turn:
    if rng.random() < 0.25:
        index = rng.randrange(12)
        user = rng.choice(("How many days does {m} have?", "How many days are in {m}?", "How long is {m}?"))
        length = words.MONTH_DAYS[index]
        thinking, answer = f"{words.MONTHS[index]}: {length}", f"{words.MONTHS[index]} has {length} days."
        user = user.format(m=words.MONTHS[index])
        return Turn(user=user, thinking=thinking, answer=answer, check=number_check(length), task="calendar")
    start, count, back = rng.randrange(12), rng.randint(1, 24), rng.random() < 0.4
    year, rest = divmod(count, 12)
    walk = [words.MONTHS[(start + (-index if back else index)) % 12] for index in range(rest + 1)]
    word = "before" if back else "after"
    plural = "" if count == 1 else "s"
    user = rng.choice(("What month is {n} month{s} {w} {m}?", "Which month comes {n} month{s} {w} {m}?"))
    user = user.format(n=count, s=plural, w=word, m=words.MONTHS[start])
    thinking = f"{count} = 12*{year} + {rest}\n{' -> '.join(walk)}"
    answer = f"{count} month{plural} {word} {words.MONTHS[start]} is {walk[-1]}."
    check = Check(kind="last_word", value=(walk[-1],), choices=words.MONTHS)
    return Turn(user=user, thinking=thinking, answer=answer, check=check, task="calendar")


def date(rng: Random, held_out: bool) -> Turn:
    index = rng.randrange(12)
    length, name = words.MONTH_DAYS[index], words.MONTHS[index]
    day, count = rng.randint(1, length), rng.randint(1, 28)
    total = day + count
    lines = [f"{name}: {length}", arithmetic.add(day, count)]
    target_day, target = total, name
    if total > length:
        target = words.MONTHS[(index + 1) % 12]
        target_day = total - length
        lines += [f"{total} > {length}, {target}", arithmetic.subtract(total, length)]
    else:
        lines.append(f"{total} <= {length}, {target}")
    plural = "" if count == 1 else "s"
    user = rng.choice(("What date is {n} day{s} after {d} {m}?", "It is {d} {m}. What is the date in {n} day{s}?"))
    user = user.format(n=count, s=plural, d=day, m=name)
    answer = f"It is {target_day} {target}."
    check = Check(kind="words", value=(str(target_day), target), choices=(*words.MONTHS, *map(str, range(1, 32))))
    return Turn(user=user, thinking="\n".join(lines), answer=answer, check=check, task="calendar")
