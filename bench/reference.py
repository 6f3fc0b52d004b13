"""The reference: the same checkpoint in transformers, float32, with what it routed and how sure it was."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Recorded:
    """One prompt through the reference."""

    logits: torch.Tensor  # [T, vocab]
    topk_ids: dict[int, torch.Tensor]  # by layer, [T, top_k]
    topk_weights: dict[int, torch.Tensor]
    gaps: dict[int, torch.Tensor]  # by layer, [T]: probability of the last expert chosen - of the first one left out


@dataclass(frozen=True, slots=True)
class Greedy:
    token_ids: list[int]
    margins: list[float]  # top logit - second logit, at each token


class Reference:
    def __init__(self, folder: str | Path) -> None:
        import transformers  # slow, and only a reference: not a dependency of serving

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def record(self, prompt: Sequence[int]) -> Recorded:
        ids, weights, gaps = {}, {}, {}

        def hook(layer_id: int):  # type: ignore[no-untyped-def]
            def keep(_module, _inputs, output) -> None:  # type: ignore[no-untyped-def]
                logits, topk_weights, topk_ids = output
                ids[layer_id], weights[layer_id] = topk_ids, topk_weights
                top_k = topk_ids.shape[-1]
                probs = torch.softmax(logits.float(), dim=-1).sort(dim=-1, descending=True).values
                left_out = probs[:, top_k] if top_k < probs.shape[-1] else torch.zeros(len(probs))
                gaps[layer_id] = probs[:, top_k - 1] - left_out

            return keep

        gates = [(i, layer.mlp.gate) for i, layer in enumerate(self.model.model.layers) if hasattr(layer.mlp, "gate")]
        handles = [gate.register_forward_hook(hook(i)) for i, gate in gates]
        logits = self.model(torch.tensor([list(prompt)])).logits[0]
        for handle in handles:
            handle.remove()
        return Recorded(logits, ids, weights, gaps)

    @torch.inference_mode()
    def greedy(self, prompts: Sequence[Sequence[int]], num_new: int) -> list[Greedy]:
        """Prompts of one length, so that no padding touches the numbers."""
        assert len({len(p) for p in prompts}) == 1
        made = [Greedy([], []) for _ in prompts]
        ids, cache = torch.tensor([list(p) for p in prompts]), None
        for _ in range(num_new):
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            top = out.logits[:, -1].topk(2)
            ids = top.indices[:, :1]
            for one, token, values in zip(made, ids[:, 0].tolist(), top.values.tolist()):
                one.token_ids.append(token)
                one.margins.append(values[0] - values[1])
        return made
