"""Training batches: documents drawn from the tasks, packed into one flat run of tokens.

Batch number `step` is a pure function of (seed, step), so many processes can make them and a resumed run goes on with
the very batches it would have seen. Two kinds of document, in the family's order: pretraining text, where every token
counts, and fine-tuning conversations, where only what the model itself would write does:
  - thinking, or none: hard switch, `/think` and `/no_think` in user or system text with the latest one winning;
  - thinking cut at a random point and closed by the early-stop sentence, so that a budget still ends in an answer."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from . import questions
from .rendering import EMPTY_BLOCK, Codec
from .tasks import Item, Turn, tool_messages

IGNORE = -1  # target of a token that does not count


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    seed: int = 0
    num_tokens: int = 65536  # a batch, padding included
    max_docs: int = 1536  # a batch; cu_seqlens has a fixed length
    max_doc_tokens: int = 2048
    pretrain_steps: int = 0
    hard_switch_share: float = 0.15
    flag_share: float = 0.15  # of the user turns
    cut_share: float = 0.18  # of the thinking documents
    direct_sum_share: float = 0.25  # of the sums drawn without thinking are kept


@dataclass(slots=True)
class Document:
    ids: list[int]
    first_target: int  # ids from here on count, but for `skip`
    skip: tuple[int, int] = (0, 0)  # the inserted closing sentence


_ITEM_MAKERS = ("simple", "memory", "tool", "mixed", "add4", "subtract4")
_ITEM_WEIGHTS = (58, 14, 11, 7, 5, 5)


def draw_item(rng: random.Random) -> Item:
    kind = rng.choices(_ITEM_MAKERS, _ITEM_WEIGHTS)[0]
    if kind == "simple":
        return Item(task="simple", turns=(questions.simple_turn(rng, False),), system=questions.system_message(rng))
    return questions.MAKERS[kind](rng, False)


def fine_tuning_document(rng: random.Random, codec: Codec, config: DataConfig) -> Document:
    """One turn of one conversation as the model meets it: rendered prompt, then what it should write.

    Sums without thinking are rare on purpose: what they need is written working, not a lucky guess."""
    while True:
        document, direct_sum = _draw_document(rng, codec, config)
        if not direct_sum or rng.random() < config.direct_sum_share:
            return document


SUMS = ("add", "subtract", "multiply", "divide", "series")


def _draw_document(rng: random.Random, codec: Codec, config: DataConfig) -> tuple[Document, bool]:
    item = draw_item(rng)
    turn_id = rng.choice(item.scored) if rng.random() < 0.6 else rng.randrange(len(item.turns))
    turn = item.turns[turn_id]
    messages = item.messages(turn_id)
    enable_thinking = rng.random() >= config.hard_switch_share
    thinks = _add_flags(rng, messages, config) and enable_thinking
    thinking, text = turn.thinking, turn.answer
    if turn.tool is not None and rng.random() < 0.5:
        thinking, text = turn.tool.thinking, turn.tool.text
    elif turn.tool is not None:
        messages += tool_messages(turn, thinking=turn.tool.thinking if thinks else "")
    prompt = codec.prompt(messages, list(item.tools), enable_thinking)
    if thinks and rng.random() < config.cut_share:
        return _cut_document(rng, codec, prompt, thinking, text), False
    if thinks:
        text = f"<think>\n{thinking}\n</think>\n\n{text}"
    elif enable_thinking:
        text = EMPTY_BLOCK + text
    document = Document(ids=prompt + codec.encode(f"{text}<|im_end|>"), first_target=len(prompt))
    return document, not thinks and turn.task in SUMS


def _add_flags(rng: random.Random, messages: list[dict[str, str]], config: DataConfig) -> bool:
    """Put soft switches into some messages; True if the latest one, or none, asks for thinking."""
    thinks = True
    for message in messages:
        share = {"user": config.flag_share, "system": 0.1}.get(message["role"], 0.0)
        if rng.random() < share:
            thinks = rng.random() < 0.4
            flag = "/think" if thinks else "/no_think"
            place = rng.random()
            content = message["content"]
            message["content"] = (
                f"{content} {flag}" if place < 0.8 else f"{content}\n{flag}" if place < 0.9 else f"{flag} {content}"
            )
    return thinks


def _cut_document(rng: random.Random, codec: Codec, prompt: list[int], thinking: str, text: str) -> Document:
    begun = codec.encode(f"<think>\n{thinking}\n")
    begun = begun[: rng.randint(1, len(begun))]
    skip = (len(prompt) + len(begun), len(prompt) + len(begun) + len(codec.early_stop_ids))
    ids = prompt + begun + codec.early_stop_ids + codec.encode(f"{text}<|im_end|>")
    return Document(ids=ids, first_target=len(prompt), skip=skip)


def pretraining_document(rng: random.Random, codec: Codec, config: DataConfig) -> Document:
    """Plain text of the task language, or a whole conversation; every token is a target."""
    if rng.random() < 0.5:
        return Document(ids=fine_tuning_document(rng, codec, config).ids, first_target=1)
    parts = [_plain(rng, questions.simple_turn(rng, False)) for _ in range(rng.randint(1, 5))]
    return Document(ids=codec.encode("\n\n".join(parts) + "<|endoftext|>"), first_target=1)


def _plain(rng: random.Random, turn: Turn) -> str:
    shape = rng.random()
    if shape < 0.4:
        return turn.thinking
    return (
        f"{turn.user}\n{turn.thinking}\n{turn.answer}"
        if shape < 0.8 or turn.task in SUMS
        else f"{turn.user}\n{turn.answer}"
    )


class Batch(NamedTuple):
    tokens: torch.Tensor  # [num_tokens] int16
    targets: torch.Tensor  # [num_tokens] int16, the next token or IGNORE
    positions: torch.Tensor  # [num_tokens] int16, from 0 in each document
    cu_seqlens: torch.Tensor  # [max_docs + 1] int32, padded with num_tokens


def pack(documents: list[Document], config: DataConfig, pad_id: int) -> Batch:
    """Documents end to end; the rest of the run is one document of padding."""
    tokens = np.full(config.num_tokens, pad_id, np.int16)
    targets = np.full(config.num_tokens, IGNORE, np.int16)
    positions = np.zeros(config.num_tokens, np.int16)
    ends, used = [0], 0
    for document in documents:
        end = used + len(document.ids)
        tokens[used:end] = document.ids
        positions[used:end] = np.arange(end - used)
        first = document.first_target
        targets[used + first - 1 : end - 1] = document.ids[first:]
        begin, stop = document.skip
        if stop:
            targets[used + begin - 1 : used + stop - 1] = IGNORE
        ends.append(end)
        used = end
    positions[used:] = np.arange(config.num_tokens - used) % config.max_doc_tokens
    while used < config.num_tokens:
        used = min(used + config.max_doc_tokens, config.num_tokens)
        ends.append(used)
    ends += [config.num_tokens] * (config.max_docs + 1 - len(ends))
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(positions), cu_seqlens)


class Batches(Dataset[Batch]):
    """Batch `step` for every step; safe to index from many processes."""

    def __init__(self, directory: Path, config: DataConfig, num_steps: int) -> None:
        self._directory, self._config, self._num_steps = directory, config, num_steps
        self._codec: Codec | None = None

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> Batch:
        if self._codec is None:
            self._codec = Codec(self._directory)
        codec, config = self._codec, self._config
        rng = random.Random(f"{config.seed}/{step}")
        draw = pretraining_document if step < config.pretrain_steps else fine_tuning_document
        documents: list[Document] = []
        used = 0
        while len(documents) < config.max_docs - 2:
            document = draw(rng, codec, config)
            if len(document.ids) > config.max_doc_tokens:
                continue
            used += len(document.ids)
            if used > config.num_tokens:
                break
            documents.append(document)
        return pack(documents, config, codec.pad_id)
