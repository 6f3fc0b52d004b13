"""Which experts a token goes to, and with what weight.

softmax over **all** experts in float32, the `top_k` largest, renormalised where the model says so. Equal
probabilities go to the lowest expert id first, so that the choice is a function of the token alone (torch.topk
leaves ties open). Reference: transformers' Qwen3MoeTopKRouter."""

import torch


def top_k(logits: torch.Tensor, k: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [num_tokens, num_experts] -> topk_ids [num_tokens, k] int32 (best first), topk_weights float32."""
    probs = torch.softmax(logits, dim=-1, dtype=torch.float32)
    topk_weights, topk_ids = _stable_top_k(probs, k)
    if renormalize:
        topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
    return topk_ids.to(torch.int32), topk_weights


def _stable_top_k(probs: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ties are rare and a stable sort costs three times a topk: sort only where the top k + 1 hold an equal pair."""
    if probs.device.type == "cpu" and k < probs.shape[-1]:
        values, ids = torch.topk(probs, k + 1, dim=-1)
        if bool((values[:, 1:] < values[:, :-1]).all()):
            return values[:, :k], ids[:, :k]
    values, ids = torch.sort(probs, dim=-1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]
