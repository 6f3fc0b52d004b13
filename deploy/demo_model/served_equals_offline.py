"""`make served-equals-offline`: held-out conversations through real clusters, by the token as transformers has them.

transformers plays the conversations first: greedy, float32, one sequence at a time (no padding); at each token the lead
of the best logit over the second is noted. Then a cluster of each number of shards plays them over gRPC, many streams
at once, each on its own answers. Prompts must be as long and outputs the same ids, stop id included. A difference that
begins where transformers' own lead is below 1e-4 is a tie: counted apart, the rest of that conversation is left out.
Exit code 1 where anything else differs; the last line is JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...cluster.app import Cluster
from .evaluate import MAX_NEW_TOKENS, Mode, Outcome, Request, held_out_items, play
from .questions import MAKERS
from .served import CHECKPOINT, Answer, Served, demo_config
from .tasks import Item

TIE_MARGIN = 1e-4
MODES: tuple[Mode, ...] = ("think", "no_think")
AskAll = Callable[[Sequence[Request]], list[Answer]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """One conversation as it was played."""

    item: Item
    mode: Mode
    answers: list[Answer] = field(default_factory=list)  # in order; a turn with a tool has two
    outcomes: list[Outcome] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Comparison:
    num_identical: int = 0  # conversations
    num_tied: int = 0  # conversations that part at a tie
    num_tokens: int = 0  # generated ones that are the same
    different: list[str] = field(default_factory=list)


def conversations(count: int) -> list[Item]:
    """`count` held-out conversations, the tasks in turn."""
    per_task = -(-count // len(MAKERS))
    items = held_out_items(items_per_task=per_task)
    return [items[task * per_task + seed] for seed in range(per_task) for task in range(len(MAKERS))][:count]


def transcribe(ask_all: AskAll, items: Sequence[Item], mode: Mode) -> list[Transcript]:
    """Play all conversations in lockstep and keep what was generated."""
    transcripts = [Transcript(item=item, mode=mode) for item in items]
    games = [play(item, mode, None) for item in items]
    waiting = [(transcript, game, next(game)) for transcript, game in zip(transcripts, games)]
    while waiting:
        answers = ask_all([request for _, _, request in waiting])
        pending, waiting = waiting, []
        for (transcript, game, _), answer in zip(pending, answers):
            transcript.answers.append(answer)
            try:
                waiting.append((transcript, game, game.send(answer.reply)))
            except StopIteration as done:
                transcript.outcomes.extend(done.value)
    return transcripts


class Reference:
    """transformers, greedy, one sequence at a time."""

    def __init__(self) -> None:
        from .offline import Offline

        self.offline = Offline(CHECKPOINT)

    def __call__(self, requests: Sequence[Request]) -> list[Answer]:
        return [self.answer(request) for request in requests]

    def answer(self, request: Request) -> Answer:
        import torch

        prompt = self.offline.codec.prompt(request.messages, request.tools, request.enable_thinking)
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            made = self.offline.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_NEW_TOKENS,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
        output = made.sequences[0, len(prompt) :].tolist()
        best = torch.cat(made.logits).topk(2, dim=-1).values  # [num_tokens, 2]
        return Answer(
            reply=self.offline.reply(output, request.enable_thinking), token_ids=tuple(output),
            num_prompt_tokens=len(prompt), margins=tuple((best[:, 0] - best[:, 1]).tolist()),
        )  # fmt: skip


def compare(expected: Sequence[Transcript], found: Sequence[Transcript]) -> Comparison:
    comparison = Comparison()
    for wanted, got in zip(expected, found, strict=True):
        _compare_one(comparison, wanted, got)
    return comparison


def _compare_one(comparison: Comparison, wanted: Transcript, got: Transcript) -> None:
    """Count one conversation, as far as it is the same."""
    for number, (theirs, ours) in enumerate(zip(wanted.answers, got.answers)):
        where = f"{wanted.item.task!r} ({wanted.mode}), reply {number}, to {wanted.item.turns[0].user!r}"
        if ours.num_prompt_tokens != theirs.num_prompt_tokens:
            prompts = f"{ours.num_prompt_tokens} prompt tokens, not {theirs.num_prompt_tokens}"
            comparison.different.append(f"{where}: {prompts}")
            return
        same = next((i for i, (a, b) in enumerate(zip(theirs.token_ids, ours.token_ids)) if a != b), None)
        if same is None and len(ours.token_ids) == len(theirs.token_ids):
            comparison.num_tokens += len(ours.token_ids)
            continue
        same = min(len(ours.token_ids), len(theirs.token_ids)) if same is None else same
        comparison.num_tokens += same
        if same < len(theirs.margins) and theirs.margins[same] < TIE_MARGIN:
            comparison.num_tied += 1
        else:
            comparison.different.append(f"{where}: other ids from generated token {same}")
        return
    if len(wanted.answers) == len(got.answers):
        comparison.num_identical += 1
    else:
        comparison.different.append(f"{wanted.item.task!r}: {len(got.answers)} replies, not {len(wanted.answers)}")


def margins_of(transcripts: Sequence[Transcript]) -> list[float]:
    return [margin for transcript in transcripts for answer in transcript.answers for margin in answer.margins]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=100, metavar="N")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4], metavar="M")
    parser.add_argument("--concurrency", type=int, default=32, metavar="N", help="streams open at a time")
    parser.add_argument("--write", action="store_true", help="replace the figures of the model card")
    options = parser.parse_args()

    items = conversations(options.conversations)
    reference = Reference()
    started = time.monotonic()
    expected = [transcript for mode in MODES for transcript in transcribe(reference, items, mode)]
    margins = margins_of(expected)
    right = sum(outcome.right for transcript in expected for outcome in transcript.outcomes)
    scored = sum(len(transcript.outcomes) for transcript in expected)
    say(f"transformers: {len(margins)} tokens in {time.monotonic() - started:.0f} s, {right} of {scored} turns right")

    rows = [compare_cluster(shards, items, expected, options.concurrency) for shards in options.shards]
    failed = any(row["different"] for row in rows)
    line = {
        "check": "served equals offline",
        "device": f"cpu, {os.cpu_count()} cores, float32",
        "conversations": len(items),
        "modes": MODES,
        "reference_tokens": len(margins),
        "reference_margin_min": min(margins),
        "reference_margins_below_tie": sum(margin < TIE_MARGIN for margin in margins),
        "rows": rows,
        "identical": not failed,
    }
    if options.write:
        (CHECKPOINT.parent / "served_equals_offline.json").write_text(
            json.dumps(line, indent=1) + "\n", encoding="utf-8"
        )
    print(json.dumps(line))
    return 1 if failed else 0


def compare_cluster(
    num_shards: int, items: Sequence[Item], expected: Sequence[Transcript], concurrency: int
) -> dict[str, Any]:
    with Cluster(demo_config(num_shards)) as cluster, Served(cluster.gateways, concurrency=concurrency) as served:

        def ask_all(requests: Sequence[Request]) -> list[Answer]:
            return served.answers(requests, with_ids=True)

        found = [transcript for mode in MODES for transcript in transcribe(ask_all, items, mode)]
    comparison = compare(expected, found)
    for difference in comparison.different:
        say(f"DIFFERENT at {num_shards} shards: {difference}")
    row = {
        "shards": num_shards,
        "identical": comparison.num_identical,
        "of": len(expected),
        "tied": comparison.num_tied,
        "different": len(comparison.different),
        "tokens": comparison.num_tokens,
    }
    say(json.dumps(row))
    return row


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
