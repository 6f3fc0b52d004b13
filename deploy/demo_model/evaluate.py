"""Play held-out conversations against anything that generates, and count what is right.

The item set, the modes and the checkers are here and know nothing of how text is made: `generate` is a callable over
requests (`offline.py` is the one over transformers, a client of a running cluster is another). A conversation is played
on the model's own answers: what it said in turn one is in the prompt of turn two, and a tool answers its own call.

`python -P -m expertmesh.deploy.demo_model.evaluate CHECKPOINT --out evaluation.json`"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .questions import MAKERS
from .tasks import Item, Json, Turn, make_item, parse_tool_call

Mode = Literal["think", "no_think", "soft_no_think"]
MODES: tuple[Mode, ...] = ("think", "no_think", "soft_no_think")
BUDGETS: tuple[int | None, ...] = (8, 16, 32, 48, 64, 96, 128, 192, 256, None)
ARITHMETIC = ("add4", "subtract4", "add", "subtract", "multiply", "divide", "series", "word problem")
ITEMS_PER_TASK = 50  # 15 tasks: 750 items
MAX_NEW_TOKENS = 512  # of one reply, thinking included


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    messages: list[Json]
    tools: list[Json]
    mode: Mode  # no_think: hard switch off; soft_no_think: `/no_think` is in the messages, the switch stays on
    budget: int | None = None  # tokens of thinking, its opening tag included

    @property
    def enable_thinking(self) -> bool:
        return self.mode != "no_think"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    reasoning: str
    text: str  # the answer, tool calls included as the model wrote them
    num_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One scored turn."""

    task: str  # of the item
    turn_task: str
    right: bool
    well_formed: bool  # a tool turn's call could be parsed, or there was none to make
    thought: bool
    num_tokens: int
    user: str
    reply: str


Generate = Callable[[Sequence[Request]], list[Reply]]


def one_by_one(generate: Callable[[Request], Reply], concurrency: int = 8) -> Generate:
    """Turn a callable for one request into one for many; `concurrency` requests are in flight."""

    def many(requests: Sequence[Request]) -> list[Reply]:
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(generate, requests))

    return many


def held_out_items(tasks: Iterable[str] = tuple(MAKERS), items_per_task: int = ITEMS_PER_TASK) -> list[Item]:
    return [make_item(task, seed, held_out=True) for task in tasks for seed in range(items_per_task)]


def evaluate(generate: Generate, items: Sequence[Item], mode: Mode, budget: int | None = None) -> list[Outcome]:
    """Play all conversations in lockstep, so that `generate` gets many requests at once."""
    outcomes: list[Outcome] = []
    plays = [play(item, mode, budget) for item in items]
    waiting = [(game, next(game)) for game in plays]
    while waiting:
        replies = generate([request for _, request in waiting])
        pending, waiting = waiting, []
        for (game, _), reply in zip(pending, replies):
            try:
                waiting.append((game, game.send(reply)))
            except StopIteration as done:
                outcomes += done.value
    return outcomes


Play = Generator[Request, Reply, list[Outcome]]


def play(item: Item, mode: Mode, budget: int | None) -> Play:
    """One conversation: yields what to ask, is sent the reply, returns its outcomes."""
    scored = {turn_id % len(item.turns) for turn_id in item.scored}
    messages: list[Json] = [{"role": "system", "content": item.system}] if item.system else []
    outcomes = []
    for turn_id, turn in enumerate(item.turns):
        flag = " /no_think" if mode == "soft_no_think" and turn_id == 0 else ""
        messages.append({"role": "user", "content": turn.user + flag})
        outcome = yield from _play_turn(item, turn, messages, mode, budget)
        if turn_id in scored:
            outcomes.append(outcome)
    return outcomes


def _play_turn(
    item: Item, turn: Turn, messages: list[Json], mode: Mode, budget: int | None
) -> Generator[Request, Reply, Outcome]:
    def request() -> Request:
        return Request(messages=list(messages), tools=list(item.tools), mode=mode, budget=budget)

    reply = yield request()
    num_tokens, well_formed, called, said = reply.num_tokens, True, True, reply.text
    if turn.tool is not None:
        call = parse_tool_call(reply.text)
        well_formed = call is not None
        called = call == (turn.tool.name, turn.tool.arguments)
        name, arguments = call or (turn.tool.name, turn.tool.arguments)
        function = {"name": name, "arguments": arguments}
        messages += [
            {"role": "assistant", "content": "", "reasoning_content": reply.reasoning,
             "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "content": turn.tool.result},
        ]  # fmt: skip
        reply = yield request()
        num_tokens += reply.num_tokens
        said = f"{said}\n{reply.text}"
    messages.append({"role": "assistant", "content": reply.text})
    right = called and "<tool_call>" not in reply.text and turn.check.accepts(reply.text)
    return Outcome(
        task=item.task, turn_task=turn.task, right=right, well_formed=well_formed, thought=bool(reply.reasoning),
        num_tokens=num_tokens, user=turn.user, reply=f"{reply.reasoning}\n=> {said}",
    )  # fmt: skip


def accuracy(outcomes: Iterable[Outcome], *, by_turn: bool = False) -> dict[str, float]:
    """Share of right turns per task, and over all turns under "all"."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for outcome in outcomes:
        for key in (outcome.turn_task if by_turn else outcome.task, "all"):
            right[key] += outcome.right
            total[key] += 1
    return {key: round(right[key] / total[key], 4) for key in total}


def report(
    generate: Generate,
    items_per_task: int = ITEMS_PER_TASK,
    *,
    curve_items_per_task: int = 0,
    parallel: int = 1,
    progress: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Everything the model card shows: accuracy per task and mode, and accuracy against thinking budget.

    The curve may be made of fewer items a task (0: as many). `parallel` of the evaluations run at a time, each in a
    thread: only for a `generate` that is better with more to do."""
    items = held_out_items(items_per_task=items_per_task)
    curve = held_out_items(ARITHMETIC, curve_items_per_task or items_per_task)

    def run(job: tuple[Sequence[Item], Mode, int | None]) -> list[Outcome]:
        outcomes = evaluate(generate, *job)
        budget = "unlimited" if job[2] is None else job[2]
        progress(f"{job[1]}, budget {budget}: {accuracy(outcomes)['all']:.1%} of {len(outcomes)} turns right")
        return outcomes

    modes = [(items, mode, None) for mode in MODES]
    budgets: list[tuple[Sequence[Item], Mode, int | None]] = [(curve, "think", budget) for budget in BUDGETS]
    with ThreadPoolExecutor(parallel) as pool:
        results = list(pool.map(run, [*modes, (curve, "no_think", None), *budgets]))
    result: dict[str, Any] = {"num_items": len(items), "num_turns": len(results[0])}
    for mode, outcomes in zip(MODES, results):
        for name, value in _mode_figures(outcomes).items():
            result.setdefault(name, {})[mode] = value
    result["budget_curve"] = [
        {"budget": budget, "accuracy": accuracy(outcomes)}
        for budget, outcomes in zip((0, *BUDGETS), results[len(MODES) :])
    ]
    return result


def _mode_figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "accuracy": accuracy(outcomes),
        "mean_tokens": round(sum(outcome.num_tokens for outcome in outcomes) / len(outcomes), 1),
        "well_formed_tool_calls": round(_mean([o.well_formed for o in outcomes if o.turn_task == "tool"]), 4),
        "thinking_share": round(_mean([o.thought for o in outcomes]), 4),
        "wrong": [[o.task, o.user, o.reply] for o in outcomes if not o.right][:40],
    }


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / max(1, len(values))


def main() -> None:
    from .offline import Offline, expert_loads

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=Path("evaluation.json"))
    parser.add_argument("--loads", type=Path, help="write tokens per layer and expert for each task here")
    parser.add_argument("--items-per-task", type=int, default=ITEMS_PER_TASK)
    options = parser.parse_args()
    start = time.perf_counter()
    offline = Offline(options.checkpoint)
    result = report(offline, options.items_per_task)
    result["seconds"] = round(time.perf_counter() - start, 1)
    options.out.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if options.loads is not None:
        options.loads.write_text(json.dumps(expert_loads(offline), indent=None) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "wrong"}, indent=1))


if __name__ == "__main__":
    main()
