"""The checkpoint through plain transformers: batched greedy decoding with thinking, no thinking and budgets.

This is the reference that a serving cluster is compared with. Thinking budget, by the family's procedure: generate up
to the budget; if thinking has not ended by then, append the early-stop sentence and go on to the answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from .evaluate import MAX_NEW_TOKENS, Reply, Request, held_out_items
from .questions import MAKERS
from .rendering import Codec
from .tasks import tool_messages


class Offline:
    """A `Generate` over one checkpoint folder, float32."""

    def __init__(self, directory: Path, *, device: str = "cpu", batch_size: int = 64) -> None:
        self.codec = Codec(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.model.to(device)
        self.device, self.batch_size = device, batch_size
        self._unlimited: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, requests: Sequence[Request]) -> list[Reply]:
        prompts = [self.codec.prompt(r.messages, r.tools, r.enable_thinking) for r in requests]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        replies: list[Reply | None] = [None] * len(prompts)
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            outputs = self.generate([prompts[i] for i in chunk], [requests[i].budget for i in chunk])
            for index, output in zip(chunk, outputs):
                replies[index] = self.reply(output, requests[index].enable_thinking)
        return [reply for reply in replies if reply is not None]

    def generate(self, prompts: list[list[int]], budgets: list[int | None]) -> list[list[int]]:
        """Generated ids of each prompt; an exceeded budget's closing ids are among them.

        Greedy thinking under a budget is a prefix of the unlimited one, so that is generated once and remembered."""
        missing = [prompt for prompt in prompts if tuple(prompt) not in self._unlimited]
        for prompt, output in zip(missing, self._decode(missing, [MAX_NEW_TOKENS] * len(missing))):
            self._unlimited[tuple(prompt)] = output
        outputs = [self._unlimited[tuple(prompt)] for prompt in prompts]
        cut = [
            index
            for index, (output, budget) in enumerate(zip(outputs, budgets))
            if budget and len(output) > budget and self.codec.think_end_id not in output[:budget]
        ]
        for index in cut:
            outputs[index] = outputs[index][: budgets[index]] + self.codec.early_stop_ids
        more = self._decode(
            [prompts[index] + outputs[index] for index in cut], [MAX_NEW_TOKENS - len(outputs[index]) for index in cut]
        )
        for index, output in zip(cut, more):
            outputs[index] = outputs[index] + output
        return outputs

    @torch.inference_mode()
    def _decode(self, prompts: list[list[int]], limits: list[int]) -> list[list[int]]:
        """Greedy decoding of left-padded prompts, each to its own limit; finished rows leave the batch."""
        outputs: list[list[int]] = [[] for _ in prompts]
        if not prompts:
            return outputs
        width, pad = max(map(len, prompts)), self.codec.pad_id
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        rows, done, cache = list(range(len(prompts))), [False] * len(prompts), None
        while True:
            step = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
            cache = step.past_key_values
            chosen = step.logits[:, -1].argmax(-1)
            for row, token in zip(rows, chosen.tolist()):
                if not done[row]:
                    outputs[row].append(token)
                    done[row] = token == self.codec.end_id or len(outputs[row]) >= limits[row]
            left = [index for index, row in enumerate(rows) if not done[row]]
            if not left:
                return outputs
            ids, positions = chosen[:, None], positions[:, -1:] + 1
            mask = torch.cat((mask, mask.new_ones(len(rows), 1)), dim=1)
            if len(left) <= 0.7 * len(rows):
                keep = torch.tensor(left, device=self.device)
                cache.batch_select_indices(keep)
                ids, positions, mask = ids[keep], positions[keep], mask[keep]
                rows = [rows[index] for index in left]

    def reply(self, output: list[int], enable_thinking: bool) -> Reply:
        """Generated ids as a reader sees them."""
        split = max((i + 1 for i, token in enumerate(output) if token == self.codec.think_end_id), default=0)
        thinking, text = self.codec.decode(output[:split]), self.codec.decode(output[split:])
        if enable_thinking and not split:  # cut inside the block
            thinking, text = text, ""
        reasoning = thinking.replace("<think>", "").replace("</think>", "").strip("\n")
        return Reply(reasoning=reasoning, text=text.strip("\n"), num_tokens=len(output))


def expert_loads(offline: Offline, items_per_task: int = 30) -> dict[str, Any]:
    """Tokens that each expert of each layer gets, `{task: [layers][experts]}`, over held-out conversations."""
    model, codec = offline.model, offline.codec
    counts = torch.zeros(model.config.num_hidden_layers, model.config.num_experts, dtype=torch.long)

    def hook(layer_id: int) -> Any:
        def add(module: Any, inputs: Any, output: Any) -> None:
            counts[layer_id] += torch.bincount(output[2].flatten().cpu(), minlength=model.config.num_experts)

        return add

    handles = [layer.mlp.gate.register_forward_hook(hook(index)) for index, layer in enumerate(model.model.layers)]
    loads, tokens = {}, {}
    for task in MAKERS:
        counts.zero_()
        tokens[task] = 0
        for item in held_out_items([task], items_per_task):
            ids = _whole_conversation(codec, item)
            tokens[task] += len(ids)
            with torch.inference_mode():
                model(torch.tensor([ids], device=offline.device), use_cache=False)
        loads[task] = counts.tolist()
    for handle in handles:
        handle.remove()
    return {"top_k": model.config.num_experts_per_tok, "num_tokens": tokens, "loads": loads}


def _whole_conversation(codec: Codec, item: Any) -> list[int]:
    turn = item.turns[-1]
    messages = item.messages(len(item.turns) - 1) + tool_messages(
        turn, thinking=turn.tool.thinking if turn.tool else ""
    )
    prompt = codec.prompt(messages, list(item.tools), True)
    return prompt + codec.encode(f"<think>\n{turn.thinking}\n</think>\n\n{turn.answer}<|im_end|>")
