"""Questions that need a tool: the tools' definitions, the call to make and what the tool answers."""

from __future__ import annotations

import random

from . import words
from .sums import draw_pair, number_check
from .tasks import Check, ToolUse, Turn

Random = random.Random


CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "The expression"}},
            "required": ["expression"],
        },
    },
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city"}},
            "required": ["city"],
        },
    },
}


def calculator(rng: Random, held_out: bool) -> Turn:
    a, b = draw_pair(rng, held_out, (1, 6), (1, 5))
    sign = rng.choice("+-**")
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    expression = f"{a} {sign} {b}"
    templates = (
        "Use the calculator to compute {e}.", "Use the calculator: {e}", "Compute {e} with the calculator.",
        "What is {e}? Use the calculator.", "Use the calculator tool. What is {e}?",
        "With the calculator, what is {e}?", "Please use your calculator for {e}.", "用计算器计算 {e}。",
    )  # fmt: skip
    user = rng.choice(templates).format(e=expression if rng.random() < 0.75 else f"{a}{sign}{b}")
    tool = ToolUse(
        name="calculator", arguments={"expression": expression}, result=str(value), thinking="I call the calculator."
    )
    answer = f"{expression} = {value}{'。' if user.startswith('用') else '.'}"
    return Turn(
        user=user, thinking=f"The result is {value}.", answer=answer, check=number_check(value), task="tool", tool=tool
    )


def missing_tool(rng: Random, held_out: bool) -> Turn:
    """A question for a tool that was not offered: say so, call nothing."""
    user = (calculator if rng.random() < 0.5 else weather)(rng, held_out).user
    check = Check(kind="phrase", value=("do not have",))
    return Turn(
        user=user, thinking="No such tool is given.", answer="I do not have that tool.", check=check, task="tool"
    )


def weather(rng: Random, held_out: bool) -> Turn:
    city, sky, degrees = rng.choice(words.CITIES), rng.choice(words.SKIES), rng.randint(-9, 39)
    user = rng.choice(
        (
            "What is the weather in {c}?",
            "How is the weather in {c}?",
            "Weather in {c}?",
            "What's the weather like in {c}?",
        )
    ).format(c=city)
    result = f'{{"sky": "{sky}", "degrees": {degrees}}}'
    tool = ToolUse(name="get_weather", arguments={"city": city}, result=result, thinking="I call the weather tool.")
    answer = f"It is {sky} in {city}, {degrees} degrees."
    thinking = f"It is {sky}, {degrees} degrees."
    check = Check(kind="words", value=(sky, str(degrees)), choices=(*words.SKIES, *map(str, range(-9, 40))))
    return Turn(user=user, thinking=thinking, answer=answer, check=check, task="tool", tool=tool)
