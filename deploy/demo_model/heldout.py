"""A held-out set for the training log: is every token of the completion the likeliest one?

Why teacher-forced: one forward pass tells whether greedy decoding would write exactly the expected text, at a
thousandth of decoding's price. It is a lower bound: other right wordings count as wrong. `evaluate.py` decodes."""

from __future__ import annotations

from pathlib import Path

import torch

from .data import Batch, DataConfig, Document, pack
from .questions import MAKERS
from .rendering import Codec
from .tasks import make_item, tool_messages


class HeldOut:
    """Documents of every task, thinking and not, packed like training batches."""

    def __init__(self, directory: Path, config: DataConfig, items_per_task: int = 48) -> None:
        codec = Codec(directory)
        self.batches: list[Batch] = []
        self._labels: list[list[str]] = []
        documents: list[Document] = []
        labels: list[str] = []
        for task in MAKERS:
            for seed in range(1_000_000, 1_000_000 + items_per_task):
                for thinking in (True, False):
                    document = _document(codec, task, seed, thinking)
                    if sum(len(d.ids) for d in documents) + len(document.ids) > config.num_tokens:
                        self._close(documents, labels, config, codec)
                        documents, labels = [], []
                    documents.append(document)
                    labels.append(f"{task}, {'think' if thinking else 'no_think'}")
        self._close(documents, labels, config, codec)

    def _close(self, documents: list[Document], labels: list[str], config: DataConfig, codec: Codec) -> None:
        if documents:
            self.batches.append(pack(documents, config, codec.pad_id))
            self._labels.append(labels)

    def score(self, hits: list[torch.Tensor]) -> dict[str, float]:
        right: dict[str, list[bool]] = {}
        for batch, labels, hit in zip(self.batches, self._labels, hits):
            misses = torch.cat((torch.zeros(1), (~hit).float().cumsum(0)))
            ends = batch.cu_seqlens.long()
            for label, count in zip(labels, misses[ends[1:]] - misses[ends[:-1]]):
                right.setdefault(label, []).append(float(count) == 0)
        return {label: round(sum(values) / len(values), 3) for label, values in right.items()}


def _document(codec: Codec, task: str, seed: int, thinking: bool) -> Document:
    item = make_item(task, seed, held_out=True)
    turn_id = item.scored[-1] % len(item.turns)
    turn, messages = item.turns[turn_id], item.messages(turn_id)
    thought, text = turn.thinking, turn.answer
    if turn.tool is not None and seed % 2:
        thought, text = turn.tool.thinking, turn.tool.text
    elif turn.tool is not None:
        messages += tool_messages(turn, thinking=turn.tool.thinking if thinking else "")
    prompt = codec.prompt(messages, list(item.tools), thinking)
    text = f"<think>\n{thought}\n</think>\n\n{text}" if thinking else text
    return Document(ids=prompt + codec.encode(f"{text}<|im_end|>"), first_target=len(prompt))
