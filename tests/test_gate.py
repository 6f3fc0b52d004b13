"""The gate: softmax over all experts, the largest k, ties to the lowest id."""

import torch

from expertmesh.router.gate import top_k


def test_weights_are_softmax_over_all_experts_then_renormalised():
    logits = torch.randn(9, 32)
    probs = torch.softmax(logits, dim=-1)
    ids, plain = top_k(logits, 8, renormalize=False)
    assert ids.dtype == torch.int32
    assert plain.dtype == torch.float32
    assert torch.equal(plain, torch.topk(probs, 8).values)
    assert torch.equal(probs.gather(1, ids.long()), plain)
    same_ids, normed = top_k(logits, 8, renormalize=True)
    assert torch.equal(same_ids, ids)
    assert torch.allclose(normed.sum(-1), torch.ones(9))


def test_ties_go_to_the_lowest_expert_id():
    logits = torch.zeros(3, 16)
    logits[1, 5] = 1.0
    logits[2, 12:] = 1.0
    ids, _ = top_k(logits, 4, renormalize=True)
    assert ids.tolist() == [[0, 1, 2, 3], [5, 0, 1, 2], [12, 13, 14, 15]]


def test_a_tie_elsewhere_in_the_batch_changes_no_row():
    logits = torch.randn(5, 16)
    alone, weights = top_k(logits, 4, renormalize=True)
    ids, together = top_k(torch.cat([logits, torch.zeros(1, 16)]), 4, renormalize=True)
    assert torch.equal(ids[:5], alone)
    assert torch.equal(together[:5], weights)


def test_all_experts_may_be_chosen():
    ids, weights = top_k(torch.tensor([[0.0, 2.0, 1.0]]), 3, renormalize=False)
    assert ids.tolist() == [[1, 2, 0]]
    assert torch.allclose(weights.sum(), torch.tensor(1.0))


def test_low_precision_logits_are_weighed_in_float32():
    _, weights = top_k(torch.randn(2, 8).bfloat16(), 2, renormalize=True)
    assert weights.dtype == torch.float32


def test_no_tokens():
    ids, weights = top_k(torch.empty(0, 8), 2, renormalize=True)
    assert ids.shape == weights.shape == (0, 2)
