"""How much of a prompt a step may take beside decodes, from how long steps were. Pure: seconds come in as data.

Why learned: what a prompt token costs follows from model, kernels, GPU and context; a fixed number of tokens is too
many for one of them and too few for another. Streams wait for the whole step, so it may take `stretch` times a step of
decodes alone. A step with prompts is taken to last

    base + token_s * tokens + context_s * (sum over tokens of the context before each)

`base` is what a step of decodes takes that has met all experts (64 tokens and more), so it is measured by itself and
not fitted: steps that are held to one length would be explained by a base of that length as well. The other two are
least squares over recent steps, older ones counting less, neither below zero; arithmetic (`attention_parity`) stands
in for their ratio until contexts of other lengths have been met. What both have missed of the last steps is made good
at once: other kernels take over as a context grows. A step that was held up counts at most as twice as long as was
expected of it.

While prompts go on without end nobody sees a step of decodes alone, and streams grow longer meanwhile: each
`_BETWEEN` steps a few have no prompts in them, to be measured.

Where few decodes run, a step with prompts takes many times theirs whatever it holds, for it reads all experts: a
step's own base is what prompts get there, so that half of the GPU's time does their work. And a step is forgotten only
as far as newer ones say as much: few tokens in a step tell little of a token, and would tell worse the fewer they got.
Where more requests wait for their first token than for a next one, as when many come at once, a step may take longer in
that proportion, up to `_MOST`: most of what larger steps save is saved by then.
Idea: Sarathi-Serve's chunks under a bound of the time between tokens, with the bound's price learned."""

import math
from collections import deque
from dataclasses import dataclass

SATURATED = 64  # tokens of a step that meet about all experts
_KEPT = 3  # last times of steps of decodes; their median counts
_GAIN = 0.25  # of what others have in a new step
_DECAY = 0.98  # of what older steps with prompts say: half after 34
_MOST = 4.0  # times as long
_DRIFT = 0.3  # of what was missed of a new one
_TRUST = 8  # observations before a step can be called held up
_BETWEEN = 128  # steps with prompts beside decodes, at most, between two without
_DOUBT = 1e4  # weight of arithmetic: of a step of 200 tokens 5000 far into a context
_CONTEXT = 1e4  # tokens of context: both unknowns come out alike in size


@dataclass(frozen=True, slots=True)
class Work:
    """What one step held. `reach` is the sum over prompt tokens of the context before them."""

    num_decodes: int
    num_prompt_tokens: int = 0
    reach: int = 0
    num_others: int = 0  # tokens of other replicas, who share the experts and the step


@dataclass(frozen=True, slots=True)
class Allowance:
    """`cost`: tokens of no context that fit a step; `parity`: the context at which one counts as two."""

    cost: float
    parity: float  # 0 = context costs nothing

    @classmethod
    def of(cls, num_tokens: int, parity: float) -> "Allowance":
        """So many tokens of no context."""
        return cls(cls(0.0, parity).cost_of(0, num_tokens), parity)

    def num_tokens(self, context: int, cost: float | None = None) -> int:
        """That run for this much, the next of a prompt of which so many have been computed."""
        cost = self.cost if cost is None else cost
        if not self.parity:
            return int(cost + 1e-6)
        first = 1 + context / self.parity
        return int(2 * cost / (first + math.sqrt(first * first + 2 * cost / self.parity)) + 1e-6)

    def cost_of(self, context: int, num_tokens: int) -> float:
        return num_tokens * (1 + (context + num_tokens / 2) / self.parity) if self.parity else float(num_tokens)


class Pace:
    """One a scheduler."""

    def __init__(self, stretch: float, *, most_decodes: int, parity: int = 0) -> None:
        """`most_decodes`: sequences that a step can hold; `parity`: `ModelConfig.attention_parity_tokens`, 0 = no
        guess."""
        self._stretch, self._most_decodes = stretch, most_decodes
        self._guess = _CONTEXT / parity if parity else 0.0  # context_s / token_s
        self._decode_s: dict[int, deque[float]] = {}  # by power of two
        self._others = 0.0
        self._num_beside = 0  # steps in a row that held both ...
        self._num_owed = 0  # ... and without prompts, to be made now
        self._count = 0
        self._drift = 1.0  # of prompts' part of a step: what it was lately, of what was expected
        self._tt = self._tr = self._rr = self._ty = self._ry = 0.0  # decayed sums over tokens, reach and seconds
        self.token_s = self.context_s = 0.0  # the second per token and `_CONTEXT` tokens of context

    def observe(self, work: Work, seconds: float) -> None:
        """A step took so long, by the clock of the device that did it; 0 = it was not as others of its kind."""
        if not work.num_prompt_tokens:
            self._num_beside, self._num_owed = 0, max(0, self._num_owed - 1)
        elif work.num_decodes:
            self._num_beside += 1
            if self._num_beside == _BETWEEN:
                self._num_beside, self._num_owed = 0, _KEPT
        if not seconds:
            return
        self._others += _GAIN * (work.num_others - self._others)
        if not work.num_prompt_tokens:
            if work.num_decodes:
                self._observe_decodes(work.num_decodes, max(seconds - self.token_s * work.num_others, seconds / 2))
        elif work.num_prompt_tokens + work.num_decodes >= SATURATED and (base := self.base_s(work.num_decodes)):
            self._observe_prompts(work, base, seconds)

    def base_s(self, num_decodes: int) -> float:
        """A step of these decodes and so many more that all experts are met; 0 = no such step was met yet."""
        alone, many = self._decodes_s(num_decodes), self._decodes_s(min(SATURATED, self._most_decodes))
        return max(alone, many) if many and (alone or not num_decodes) else 0.0

    def allowance(self, num_decodes: int, num_prompts: int = 1) -> Allowance | None:
        """For so many prompts in a step beside so many decodes; None = not known yet."""
        base = self.base_s(num_decodes)
        if not base or not self.token_s:
            return None
        most = min(_MOST, max(1.0, num_prompts / num_decodes))
        room_s = most * max(self._stretch * self._decodes_s(num_decodes), 2 * base) - base
        cost = room_s / (self._drift * self.token_s)
        parity = _CONTEXT * self.token_s / self.context_s if self.context_s else 0.0
        return Allowance(0.0 if self._num_owed else max(cost - self._others, cost / 4), parity)

    def __str__(self) -> str:
        decodes = ", ".join(f"{size}: {1e3 * _median(found):.2f}" for size, found in sorted(self._decode_s.items()))
        return (
            f"decodes {decodes or '-'} ms; a prompt token {1e6 * self.token_s:.2f} us, "
            f"{1e6 * self.context_s:.2f} us more after {_CONTEXT:.0f} tokens"
        )

    def _decodes_s(self, num_decodes: int) -> float:
        """Of the smallest size met that holds them."""
        if not num_decodes:
            return 0.0
        size = min((size for size in self._decode_s if size >= num_decodes), default=0)
        return _median(self._decode_s[size]) if size else 0.0

    def _observe_decodes(self, num_decodes: int, seconds: float) -> None:
        size = 1 << (num_decodes - 1).bit_length()
        self._decode_s.setdefault(size, deque(maxlen=_KEPT)).append(seconds)

    def _observe_prompts(self, work: Work, base: float, seconds: float) -> None:
        tokens, reach = float(work.num_prompt_tokens + work.num_others), work.reach / _CONTEXT
        share = 1.0
        if self._count >= _TRUST:
            expected = self.token_s * tokens + self.context_s * reach
            seconds = min(max(seconds, (base + expected) / 2), 2 * (base + expected))
            share = min(1.0, expected / base)
            self._drift += _DRIFT * share * (min(max((seconds - base) / expected, 0.5), 2.0) - self._drift)
        self._count += 1
        extra, decay = max(0.0, seconds - base), 1 - share * (1 - _DECAY)
        self._tt = decay * self._tt + tokens * tokens
        self._tr = decay * self._tr + tokens * reach
        self._rr = decay * self._rr + reach * reach
        self._ty = decay * self._ty + tokens * extra
        self._ry = decay * self._ry + reach * extra
        self._solve()

    def _solve(self) -> None:
        """Least squares, with one observation more, of little weight: context_s = guess * token_s."""
        guess, weight = self._guess, _DOUBT
        tt, tr, rr = self._tt + weight * guess * guess, self._tr - weight * guess, self._rr + weight
        scale = 1 / (tt * rr - tr * tr)
        token_s, context_s = scale * (self._ty * rr - self._ry * tr), scale * (self._ry * tt - self._ty * tr)
        if context_s < 0.0:
            token_s, context_s = self._ty / self._tt, 0.0
        elif token_s < 0.0:
            token_s, context_s = 0.0, self._ry / self._rr
        self.token_s, self.context_s = max(token_s, context_s / 100), context_s


def _median(found: deque[float]) -> float:
    """The lower one of two."""
    return sorted(found)[(len(found) - 1) // 2]
