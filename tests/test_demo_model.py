"""The demo model: the generator is seeded and right, the checkpoint is plain Qwen3-MoE, and what it says is true."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from expertmesh.deploy.demo_model import arithmetic, evaluate
from expertmesh.deploy.demo_model.data import Batches, DataConfig, fine_tuning_document
from expertmesh.deploy.demo_model.model import ModelConfig, TrainingModel, load_hf_state_dict
from expertmesh.deploy.demo_model.offline import Offline
from expertmesh.deploy.demo_model.questions import MAKERS
from expertmesh.deploy.demo_model.rendering import EARLY_STOP, Codec
from expertmesh.deploy.demo_model.tasks import Check, make_item, parse_tool_call
from expertmesh.deploy.demo_model.tokenizer import MARKERS, SPECIAL

FOLDER = Path(evaluate.__file__).parent
CHECKPOINT = FOLDER / "checkpoint"
QWEN3 = FOLDER.parents[1] / "router" / "gateway" / "qwen3"


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(CHECKPOINT)


@pytest.fixture(scope="module")
def offline() -> Offline:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Offline(CHECKPOINT)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("task", MAKERS)
def test_an_item_is_a_function_of_its_seed_and_its_checker_accepts_its_own_answer(task: str) -> None:
    for seed in range(60):
        for held_out in (False, True):
            item = make_item(task, seed, held_out=held_out)
            assert item == make_item(task, seed, held_out=held_out)
            assert all(turn.check.accepts(turn.answer) for turn in item.turns)
            calls = [turn.tool for turn in item.turns if turn.tool is not None]
            assert all(parse_tool_call(tool.text) == (tool.name, tool.arguments) for tool in calls)
    assert len({repr(make_item(task, seed).turns) for seed in range(60)}) > 20 or task == "greeting"


def test_checkers_reject_wrong_answers() -> None:
    number = Check(kind="number", value=("52",))
    assert number.accepts("17 + 35 = 52.")
    assert not number.accepts("17 + 35 = 53.")
    assert not number.accepts("-52")
    assert not number.accepts("")
    day = Check(kind="last_word", value=("Friday",), choices=("Friday", "Monday"))
    assert day.accepts("4 days after Monday is Friday.")
    assert not day.accepts("Friday? No, Monday.")
    assert not Check(kind="numbers", value=("1", "2")).accepts("2, 1")
    assert parse_tool_call('<tool_call>\n{"name": "calculator", "arguments": "5"}\n</tool_call>') is None
    assert parse_tool_call("<tool_call>\n{broken\n</tool_call>") is None


def test_held_out_operands_are_never_trained_on() -> None:
    for task in ("add4", "subtract4", "multiply"):
        for seed in range(200):
            a, b = (
                int(x) for x in make_item(task, seed).turns[0].answer.split(" = ")[0].replace("*", "+").split()[::2]
            )
            assert not arithmetic.is_held_out(a, b)


def test_written_working_ends_in_the_result() -> None:
    rng = random.Random(0)
    for _ in range(300):
        a, b = rng.randrange(10 ** rng.randint(1, 8)), rng.randrange(10 ** rng.randint(1, 8))
        assert arithmetic.add(a, b).endswith(f"\n= {a + b}")
        assert arithmetic.subtract(a, b).endswith(f"\n= {a - b}")
        assert arithmetic.multiply(a, b % 100).endswith(f"\n= {a * (b % 100)}")
        last = arithmetic.divide(a, 7).splitlines()[-1]
        assert last == f"= {a // 7}" + (f" rest {a % 7}" if a % 7 else "")


def test_cut_thinking_has_no_loss_on_the_closing_sentence(codec: Codec) -> None:
    rng, cut = random.Random(1), 0
    for _ in range(200):
        document = fine_tuning_document(rng, codec, DataConfig())
        begin, stop = document.skip
        cut += stop > 0
        assert codec.tokenizer.decode(document.ids[begin:stop], skip_special_tokens=False) == (
            EARLY_STOP if stop else ""
        )
        assert document.ids[-1] == codec.end_id
    assert 10 < cut < 60


def test_batches_are_a_function_of_seed_and_step() -> None:
    config = DataConfig(num_tokens=2048, max_docs=64, max_doc_tokens=1024)
    first, again = Batches(CHECKPOINT, config, 10), Batches(CHECKPOINT, config, 10)
    assert all(torch.equal(a, b) for a, b in zip(first[7], again[7]))
    assert not torch.equal(first[7].tokens, first[8].tokens)


def test_the_tokenizer_is_qwen3s_with_other_ids(codec: Codec) -> None:
    own = json.loads((CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8"))
    flags = [(token["content"], token["special"]) for token in own["added_tokens"]]
    assert flags == [(token, True) for token in SPECIAL] + [(token, False) for token in MARKERS]
    qwen3 = json.loads((QWEN3 / "tokenizer.json").read_text(encoding="utf-8"))
    assert flags == [(token["content"], token["special"]) for token in qwen3["added_tokens"]]
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert own[part] == qwen3[part]
    assert not {t["id"] for t in own["added_tokens"]} & {t["id"] for t in qwen3["added_tokens"]}
    assert (CHECKPOINT / "chat_template.jinja").read_bytes() == (QWEN3 / "chat_template.jinja").read_bytes()
    for text in (
        "What is 4821 + 377?",
        "你好，我叫小明。",
        "naïve café 🙂\n\n\ttabs  ",
        "<think>\n1+2=3\n</think>\n\nok",
    ):
        assert codec.tokenizer.decode(codec.encode(text), skip_special_tokens=False) == text
    assert len(codec.encode("4821")) == 4


def test_transformers_loads_the_folder_unchanged_and_renders_alike(codec: Codec, offline: Offline) -> None:
    from transformers import AutoTokenizer

    config = offline.model.config
    assert type(offline.model).__name__ == "Qwen3MoeForCausalLM"
    assert config.num_experts >= 32
    assert config.num_experts_per_tok == 8
    assert config.num_hidden_layers >= 4
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings >= 4096
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if "__pycache__" not in file.parts) < 12_000_000
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    for task in MAKERS:
        item = make_item(task, 0, held_out=True)
        for thinking in (True, False):
            ids = tokenizer.apply_chat_template(
                item.messages(len(item.turns) - 1), tools=list(item.tools) or None, enable_thinking=thinking,
                add_generation_prompt=True, return_dict=False,
            )  # fmt: skip
            assert ids == codec.prompt(item.messages(len(item.turns) - 1), list(item.tools), thinking)


def test_the_training_model_is_the_exported_one(codec: Codec, offline: Offline) -> None:
    model = TrainingModel(ModelConfig())
    load_hf_state_dict(model, load_file(CHECKPOINT / "model.safetensors"))
    batch = Batches(CHECKPOINT, DataConfig(num_tokens=512, max_docs=16, max_doc_tokens=512), 4)[3]
    with torch.no_grad():
        _, hits, share, _ = model(
            batch.tokens.long(), batch.targets.long(), batch.positions.long(), batch.cu_seqlens, 512
        )
        end = int(batch.cu_seqlens[1])
        expected = offline.model(batch.tokens[None, :end].long()).logits[0].argmax(-1)
    targets = batch.targets[:end].long()
    assert torch.equal(hits[:end], (expected == targets) | (targets < 0))
    assert share.shape == (6, 32)
    torch.testing.assert_close(share.sum(-1), torch.full((6,), 8.0))


def test_a_sample_of_the_held_out_set_is_right_when_it_thinks(offline: Offline) -> None:
    items = evaluate.held_out_items(items_per_task=2)
    outcomes = evaluate.evaluate(offline, items, "think")
    assert [(o.user, o.reply) for o in outcomes if not o.right] == []
    assert all(outcome.well_formed and outcome.thought for outcome in outcomes)


def test_no_thinking_answers_at_once_and_keeps_its_memory(offline: Offline) -> None:
    items = evaluate.held_out_items(("memory", "tool", "greeting"), 3)
    for mode in ("no_think", "soft_no_think"):
        outcomes = evaluate.evaluate(offline, items, mode)
        assert [(o.user, o.reply) for o in outcomes if not o.right] == []
        assert not any(outcome.thought for outcome in outcomes)


def test_a_budget_cuts_the_thinking_and_an_answer_follows(offline: Offline) -> None:
    items = evaluate.held_out_items(("multiply",), 3)
    requests = [evaluate.Request(messages=item.messages(0), tools=[], mode="think", budget=12) for item in items]
    for item, reply in zip(items, offline(requests)):
        assert reply.reasoning.endswith("based on the thinking directly now.")
        assert reply.text.startswith(item.turns[0].answer.split(" = ")[0])
