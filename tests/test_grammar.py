"""Promise: where the answer begins and what may come is a fold over accepted tokens; a vocabulary of any size."""

import json
import re

import numpy as np
import pytest
import torch
from grammar_walks import allowed_ids

from expertmesh.bench.local_engine import LocalEngine
from expertmesh.cluster.attention.grammar import GrammarState, Phase
from expertmesh.config import CacheConfig
from expertmesh.make_checkpoint import PRESETS, make_checkpoint
from expertmesh.proto import expertmesh_pb2 as pb
from expertmesh.request import AnswerGrammar, EngineRequest, FinishReason, SamplingParams, ThinkingBudget
from expertmesh.router.gateway.link_messages import decode_submit, encode_submit
from expertmesh.router.gateway.tokenizer import QWEN3_FOLDER, Tokenizer

VOCAB, STOP, THINK, END, SEPARATOR, CALL = 100, 99, 31, 32, 63, 64
IDS = {"think_id": THINK, "end_think_id": END, "separator_id": SEPARATOR, "tool_call_id": CALL}


class Spelling:
    """A grammar of one text: its tokens in order, then the stop id."""

    def __init__(self, *ids: int) -> None:
        self.left = [*ids, STOP]

    def accept_token(self, token_id: int) -> bool:
        return self.left.pop(0) == token_id

    def fill_next_token_bitmask(self, bitmask: np.ndarray, index: int = 0) -> bool:
        bitmask[index] = 0
        if self.left:
            bitmask[index, self.left[0] >> 5] = np.array(1 << (self.left[0] & 31), np.uint32).astype(np.int32)
        return True


def state(**fields) -> GrammarState:
    grammar = AnswerGrammar(kind="choice", source="", **{**IDS, **fields})
    return GrammarState(grammar, Spelling(7, 8), vocab_size=VOCAB, stop_ids=frozenset({STOP}))


def may_come(machine: GrammarState) -> set[int]:
    return set(allowed_ids(machine, VOCAB).tolist())


def test_without_a_block_only_the_answer_and_then_the_end():
    machine = state()
    assert may_come(machine) == {7, THINK, CALL}
    machine.accept(7)
    assert may_come(machine) == {8}
    machine.accept(8)
    assert may_come(machine) == {STOP}


def test_a_prompt_that_closed_the_block_leaves_no_other_beginning():
    assert may_come(state(think_id=-1, tool_call_id=-1)) == {7}


@pytest.mark.parametrize("inside", [False, True])
def test_thinking_is_free_but_for_the_end_of_the_turn(inside):
    machine = state(starts_inside=inside)
    if not inside:
        machine.accept(THINK)
    for token_id in (7, THINK, 50, CALL):
        assert may_come(machine) == set(range(VOCAB)) - {STOP}
        machine.accept(token_id)
    machine.accept(END)
    assert may_come(machine) == {7, SEPARATOR, CALL}
    machine.accept(SEPARATOR)
    assert may_come(machine) == {7, CALL}
    machine.accept(7)
    assert may_come(machine) == {8}


def test_a_forced_closing_sentence_is_no_answer():
    machine = state(starts_inside=True)
    for token_id in (7, 8, END, SEPARATOR):
        machine.accept(token_id, forced=True)
    assert may_come(machine) == {7, CALL}


def test_a_call_is_free():
    machine = state()
    machine.accept(CALL)
    assert (machine.phase, machine.mask()) == (Phase.FREE, None)


def test_a_token_that_the_grammar_does_not_allow_is_never_taken_for_granted():
    with pytest.raises(AssertionError, match="does not allow token 9"):
        state().accept(9)


def test_a_grammar_survives_the_wire_and_the_journal():
    grammar = AnswerGrammar(kind="regex", source="a+ü", starts_inside=True, **IDS)
    request = EngineRequest(request_id="r", prompt_ids=(1,), sampling=SamplingParams(), grammar=grammar)
    message = pb.Submit.FromString(encode_submit(1, request).SerializeToString())
    assert decode_submit(message, "r") == request


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights over the whole vocabulary of Qwen3: nearly any token is as likely as any other."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("grammar-model")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_experts": 8, "num_experts_per_tok": 2}
    make_checkpoint(folder, {**PRESETS["tiny-moe"], **sizes, "vocab_size": 151_936}, seed=3, dtype="float32")
    return folder


def test_a_model_of_random_weights_answers_in_form(folder):
    tokenizer = Tokenizer(QWEN3_FOLDER)
    special = tokenizer.special_ids
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": -5, "maximum": 500}, "ok": {"type": "boolean"}},
        "required": ["n", "ok"],
    }
    grammars = {
        "json_schema": json.dumps(schema),
        "regex": r"[a-z]{2,6}@[a-z]{2,6}\.(com|org)",
        "choice": json.dumps(["好", "naïve 👋", 'q"'], ensure_ascii=False),
    }
    assert special.think is not None
    assert special.end_think is not None
    budget = ThinkingBudget(
        budget_tokens=5,
        think_id=special.think,
        end_think_id=special.end_think,
        closing_ids=(1, special.end_think, 271),
        starts_inside=True,
    )
    requests = []
    for kind, source in grammars.items():
        for seed in range(4):
            thinks = seed % 2 == 1
            grammar = AnswerGrammar(
                kind=kind, source=source, starts_inside=thinks, end_think_id=special.end_think, separator_id=271
            )
            sampling = SamplingParams(
                temperature=1.0, top_p=0.9 if seed > 1 else 1.0, seed=seed, max_tokens=80, stop_token_ids=special.eos
            )
            requests.append(
                EngineRequest(
                    request_id=f"{kind} {seed}",
                    prompt_ids=(9, 10 + seed),
                    sampling=sampling,
                    thinking=budget if thinks else None,
                    grammar=grammar,
                )
            )
    with LocalEngine(folder, cache=CacheConfig(num_blocks=200)) as engine:
        streams = engine.run(requests)
        assert engine.books_balance
    for request, stream in zip(requests, streams):
        assert stream.end is not None
        assert stream.end.finish_reason is FinishReason.STOP, request.request_id
        ids = stream.token_ids
        if request.thinking is not None:
            assert ids[5:8] == [1, special.end_think, 271]
            assert not special.eos & set(ids[:5])
            ids = ids[8:]
        text = tokenizer.decode(ids)
        match request.grammar.kind:
            case "json_schema":
                assert -5 <= json.loads(text)["n"] <= 500
            case "regex":
                assert re.fullmatch(grammars["regex"], text)
            case _:
                assert text in json.loads(grammars["choice"])
