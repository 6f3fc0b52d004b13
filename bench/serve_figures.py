"""From what clients saw to the figures of a load: pure.

| figure | is |
|---|---|
| TTFT | from when a request was due (an open loop does not wait for the server) to its first token |
| first answer | the same to the first token that is no thinking |
| ITL | between two messages of one stream: what a reader sees; several tokens of one message came together |
| TPOT | (last token - first token) / (tokens - 1) of one request |
| goodput | requests a second that kept both bounds of the SLO, TTFT and TPOT; failed ones count as missed |
| decode tok/s | tokens a second while all streams of a closed loop ran: what compares with an engine's step time |
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from .chart import Panel


@dataclass(slots=True)
class Record:
    """One request as its client saw it; times are seconds of one clock for all client processes."""

    script: int
    turn: int
    due_s: float
    sent_s: float = 0.0
    arrivals: list[tuple[float, int, bool]] = field(default_factory=list)  # time, tokens in it, whether thinking
    end_s: float = 0.0
    max_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0  # as the server counted
    server_ttft_s: float = 0.0  # as the gateway measured
    error: str = ""

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count, _ in self.arrivals)

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0][0] - self.due_s

    @property
    def first_answer_s(self) -> float | None:
        return next((at - self.due_s for at, _, is_thinking in self.arrivals if not is_thinking), None)

    @property
    def tpot_s(self) -> float:
        """0 where there was but one token."""
        rest = self.num_tokens - self.arrivals[0][1]
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / rest if rest else 0.0


@dataclass(frozen=True, slots=True)
class Objective:
    """The SLO of one request."""

    ttft_s: float = 0.5
    tpot_s: float = 0.05

    def kept_by(self, record: Record) -> bool:
        return not record.error and record.ttft_s <= self.ttft_s and record.tpot_s <= self.tpot_s


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one run; milliseconds, rounded for reading."""

    requests: int
    failed: int
    wall_s: float
    tokens: int
    tokens_per_s: float
    decode_tokens_per_s: float | None  # None where no moment had all streams
    requests_per_s: float
    goodput_per_s: float
    slo_kept: float  # part of the requests
    ttft_ms_p50: float
    ttft_ms_p99: float
    first_answer_ms_p50: float | None
    first_answer_ms_p99: float | None
    itl_ms_p50: float
    itl_ms_p99: float
    itl_ms_max: float
    tpot_ms_p50: float
    tokens_per_message: float
    client_lag_ms_p50: float  # from when a request was due to when it was sent: a slow client shows here
    later_turns_ttft_ms_p50: float | None
    cached_share_of_later_prompts: float | None

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


def figures(records: Sequence[Record], begun_s: float, objective: Objective) -> Figures:
    """Of all requests of a run that began at `begun_s`. Raises ValueError where no request got a token."""
    whole = [r for r in records if not r.error and r.arrivals]
    if not whole:
        raise ValueError(
            f"none of {len(records)} requests got a token: {records[0].error if records else 'none asked'}"
        )
    end_s = max(r.arrivals[-1][0] for r in whole)
    wall_s, tokens = end_s - begun_s, sum(r.num_tokens for r in whole)
    gaps = [b - a for r in whole for (a, _, _), (b, _, _) in itertools.pairwise(r.arrivals)]
    answers = [at for r in whole if (at := r.first_answer_s) is not None]
    kept = sum(objective.kept_by(r) for r in whole)
    later = [r for r in whole if r.turn]
    late = [r.ttft_s for r in later]
    prompts = sum(r.prompt_tokens for r in later)
    return Figures(
        requests=len(records),
        failed=len(records) - len(whole),
        wall_s=round(wall_s, 3),
        tokens=tokens,
        tokens_per_s=round(tokens / wall_s, 1),
        decode_tokens_per_s=decode_rate(whole),
        requests_per_s=round(len(whole) / wall_s, 3),
        goodput_per_s=round(kept / wall_s, 3),
        slo_kept=round(kept / len(records), 4),
        ttft_ms_p50=_ms([r.ttft_s for r in whole], 0.5),
        ttft_ms_p99=_ms([r.ttft_s for r in whole], 0.99),
        first_answer_ms_p50=_ms(answers, 0.5) if answers else None,
        first_answer_ms_p99=_ms(answers, 0.99) if answers else None,
        itl_ms_p50=_ms(gaps, 0.5),
        itl_ms_p99=_ms(gaps, 0.99),
        itl_ms_max=_ms(gaps, 1.0),
        tpot_ms_p50=_ms([r.tpot_s for r in whole], 0.5),
        tokens_per_message=round(tokens / sum(len(r.arrivals) for r in whole), 3),
        client_lag_ms_p50=_ms([r.sent_s - r.due_s for r in whole], 0.5),
        later_turns_ttft_ms_p50=_ms(late, 0.5) if late else None,
        cached_share_of_later_prompts=round(sum(r.cached_tokens for r in later) / prompts, 4) if prompts else None,
    )


def decode_rate(records: Sequence[Record]) -> float | None:
    """Tokens a second from when the last stream has its first token until the first stream ends; the streams that had
    one by then are those that run. None where that is no time at all, and for an open loop."""
    first = [r for r in records if not r.turn]
    if len({r.due_s for r in first}) > 1:
        return None
    begin_s, end_s = max(r.arrivals[0][0] for r in first), min(r.arrivals[-1][0] for r in first)
    if end_s <= begin_s:
        return None
    within = sum(count for r in records for at, count, _ in r.arrivals if begin_s < at <= end_s)
    return round(within / (end_s - begin_s), 1)


def wrong(records: Sequence[Record]) -> list[str]:
    """What must not be: errors, and streams that are shorter or longer than asked. Empty when all is well."""
    found = []
    for r in records:
        name = f"script {r.script}, turn {r.turn}"
        if r.error:
            found.append(f"{name}: {r.error}")
        elif r.num_tokens != r.max_tokens or r.completion_tokens != r.max_tokens:
            found.append(f"{name}: {r.num_tokens} tokens came, {r.completion_tokens} counted, {r.max_tokens} asked")
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all values do not exceed; 0.0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))] if ordered else 0.0


def panels(records: Sequence[Record], begun_s: float, title: str) -> list[Panel]:
    """Of one run over its time: tokens a second, running streams, TTFT and the longest gaps."""
    arrivals = [(at - begun_s, count, is_thinking) for r in records for at, count, is_thinking in r.arrivals]
    length = max([at for at, _, _ in arrivals], default=0.0)
    slot_s = max(length / 60, 0.05)
    num_slots = int(length / slot_s) + 1
    rates = {"answer": [0.0] * num_slots, "thinking": [0.0] * num_slots}
    for at, count, is_thinking in arrivals:
        rates["thinking" if is_thinking else "answer"][int(at / slot_s)] += count / slot_s
    lines = {name: [(i * slot_s, v) for i, v in enumerate(rate)] for name, rate in rates.items() if any(rate)}
    whole = [r for r in records if r.arrivals]
    edges = sorted([(r.sent_s - begun_s, 1) for r in whole] + [(r.arrivals[-1][0] - begun_s, -1) for r in whole])
    running = list(zip([at for at, _ in edges], itertools.accumulate(change for _, change in edges)))
    firsts = sorted((r.due_s - begun_s, r.ttft_s * 1e3) for r in whole)
    gaps = [0.0] * num_slots
    for r in whole:
        for (a, _, _), (b, _, _) in itertools.pairwise(r.arrivals):
            slot = int((b - begun_s) / slot_s)
            gaps[slot] = max(gaps[slot], (b - a) * 1e3)
    return [
        Panel(f"{title}: tokens/s", lines, steps=True),
        Panel("running streams", {"": [(at, float(count)) for at, count in running]}, steps=True),
        Panel("TTFT of requests due at that time, ms", {"": firsts}),
        Panel("longest gap between two messages, ms", {"": [(i * slot_s, v) for i, v in enumerate(gaps)]}, steps=True),
    ]


def _ms(values: Sequence[float], share: float) -> float:
    return round(percentile(values, share) * 1e3, 2)
