"""What a load asks of a cluster: scripts of requests, each with the time at which it begins.

Pure; `serve_clients.py` plays them. A closed loop is scripts that all begin at once and ask one request after the other
(as many streams as scripts); an open loop is scripts of one request each at times that do not wait for answers (a
Poisson process), so that a slow server meets a longer queue, as it would. Everything is drawn from the seed: two
systems, or two versions, get the same load."""

import random
from dataclasses import dataclass, field

OPENED = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n"
CLOSING_TOKENS = 40  # room for the sentence that ends a spent thinking budget
WORDS = [
    *("the", "expert", "tier", "multiplies", "and", "attention", "remembers", "what", "each", "shard", "was", "asked"),
    *(
        "before",
        "any",
        "token",
        "returned",
        "to",
        "its",
        "reader",
        "while",
        "routers",
        "count",
        "rows",
        "which",
        "gates",
    ),
]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `token_ids` or `prompt` is the whole prompt, or `text` the user's message."""

    max_tokens: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    prompt: str = ""
    thinking: bool = False
    thinking_budget: int = 0  # 0 = none
    ignore_eos: bool = True
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Script:
    """Requests that one client asks in order, the next when the last has ended; with a `session_id` they are the turns
    of one conversation."""

    asks: tuple[Ask, ...]
    start_s: float = 0.0
    session_id: str = ""


@dataclass(frozen=True, slots=True)
class Mix:
    """A named load."""

    name: str
    scripts: tuple[Script, ...]
    facts: dict[str, float] = field(default_factory=dict)  # for the report

    @property
    def num_asks(self) -> int:
        return sum(len(script.asks) for script in self.scripts)


def fixed(streams: int, prompt_tokens: int, output_tokens: int, *, rounds: int = 1, vocab: int, seed: int = 0) -> Mix:
    """A closed loop of `streams`; with one round, one fixed batch: all begin together and are as long."""
    draw = random.Random(seed)
    scripts = [
        Script(tuple(Ask(output_tokens, _prompt(draw, prompt_tokens, vocab)) for _ in range(rounds)))
        for _ in range(streams)
    ]
    facts = {"streams": streams, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "rounds": rounds}
    return Mix("fixed", tuple(scripts), facts)


def poisson(rate: float, requests: int, prompt_tokens: int, output_tokens: int, *, vocab: int, seed: int = 0) -> Mix:
    """An open loop of `rate` requests a second; lengths are even between half and one and a half of what is named."""
    draw = random.Random(seed)
    scripts, at = [], 0.0
    for _ in range(requests):
        at += draw.expovariate(rate)
        ask = Ask(_around(draw, output_tokens), _prompt(draw, _around(draw, prompt_tokens), vocab))
        scripts.append(Script((ask,), at))
    facts = {"rate": rate, "requests": requests, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens}
    return Mix("poisson", tuple(scripts), facts)


def thinking(
    streams: int,
    budget: int,
    answer_tokens: int,
    *,
    opened: bool = False,
    rounds: int = 1,
    words: int = 48,
    seed: int = 0,
) -> Mix:
    """Think-heavy: a question each, a thinking budget that is spent, then the answer. With `opened` the prompt ends in
    an open think block, for weights that would not open one."""
    draw = random.Random(seed)
    length = budget + CLOSING_TOKENS + answer_tokens
    asks = []
    for _ in range(streams * rounds):
        text = _text(draw, words)
        said = {"prompt": OPENED.format(text)} if opened else {"text": text}
        asks.append(Ask(length, thinking=True, thinking_budget=budget, **said))
    scripts = tuple(Script(tuple(asks[i::streams])) for i in range(streams))
    return Mix("thinking", scripts, {"streams": streams, "budget": budget, "answer_tokens": answer_tokens})


def turns(sessions: int, turns: int, output_tokens: int, *, words: int = 48, seed: int = 0) -> Mix:
    """Conversations: each turn's prompt holds all before it, which the prefix cache should give."""
    draw = random.Random(seed)
    scripts = [
        Script(
            tuple(Ask(output_tokens, text=_text(draw, words)) for _ in range(turns)),
            session_id=f"load-{draw.getrandbits(64):016x}",
        )
        for _ in range(sessions)
    ]
    return Mix("turns", tuple(scripts), {"sessions": sessions, "turns": turns, "output_tokens": output_tokens})


def shared_out(mix: Mix, parts: int) -> list[list[tuple[int, Script]]]:
    """Scripts by client process, each with its number: dealt in turn, so each has its part at all times."""
    numbered = list(enumerate(mix.scripts))
    return [numbered[i::parts] for i in range(parts) if numbered[i::parts]]


def _prompt(draw: random.Random, length: int, vocab: int) -> tuple[int, ...]:
    """Random ids: no prefix is shared."""
    return tuple(draw.randrange(vocab) for _ in range(length))


def _around(draw: random.Random, length: int) -> int:
    return draw.randint(max(1, length // 2), max(1, length + length // 2))


def _text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words)) + "?"
