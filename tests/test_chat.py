"""Promise: a prompt equals the one that Hugging Face renders, and the family is known from the template."""

import json
from pathlib import Path

import pytest

from expertmesh.errors import CheckpointError, InvalidRequest
from expertmesh.router.gateway.chat import ChatTemplate, Family
from expertmesh.router.gateway.tokenizer import QWEN3_FOLDER, Tokenizer

VECTORS = Path(__file__).parent / "data" / "qwen3" / "chat_vectors.jsonl"
TEMPLATES = {
    "hybrid": "chat_template.jinja",
    "instruct-2507": "chat_template_instruct_2507.jinja",
    "thinking-2507": "chat_template_thinking_2507.jinja",
}


@pytest.fixture(scope="module")
def qwen3() -> Tokenizer:
    return Tokenizer(QWEN3_FOLDER)


@pytest.fixture(scope="module")
def templates(qwen3) -> dict[str, ChatTemplate]:
    return {k: ChatTemplate((QWEN3_FOLDER / name).read_text(), qwen3.special_tokens) for k, name in TEMPLATES.items()}


def test_every_chat_vector_renders_and_encodes_exactly(qwen3, templates):
    vectors = [json.loads(line) for line in VECTORS.read_text().splitlines()]
    for v in vectors:
        prompt = templates[v["template"]].render(
            v["messages"],
            tools=v.get("tools"),
            enable_thinking=v.get("enable_thinking"),
            add_generation_prompt=v["add_generation_prompt"],
        )
        assert prompt == v["prompt"], v["id"]
        assert qwen3.encode(prompt) == v["ids"], v["id"]
    assert len(vectors) >= 60


def test_family_is_told_by_what_the_template_does(templates):
    assert {name: t.family for name, t in templates.items()} == {
        "hybrid": Family.HYBRID,
        "instruct-2507": Family.INSTRUCT,
        "thinking-2507": Family.THINKING,
    }


def test_hard_switch_ends_the_prompt_with_the_empty_block(qwen3, templates):
    user = [{"role": "user", "content": "hi"}]
    off = qwen3.encode(templates["hybrid"].render(user, enable_thinking=False))
    assert off[-7:] == [151644, 77091, 198, 151667, 271, 151668, 271]
    on = templates["hybrid"].render(user, enable_thinking=True)
    assert on == templates["hybrid"].render(user)
    assert on.endswith("<|im_start|>assistant\n")


def test_soft_switches_reach_the_prompt_as_plain_text(templates):
    prompt = templates["hybrid"].render([{"role": "user", "content": "hi /no_think"}])
    assert "hi /no_think<|im_end|>" in prompt
    assert "<think>" not in prompt


def test_a_template_that_refuses_its_input_is_the_users_mistake():
    strict = ChatTemplate("{% if messages|length > 1 %}{{ raise_exception('one message only') }}{% endif %}x")
    with pytest.raises(InvalidRequest, match="one message only"):
        strict.render([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


def test_a_broken_template_fails_at_start():
    with pytest.raises(CheckpointError, match="does not compile"):
        ChatTemplate("{% if %}")


def test_template_cannot_reach_out_of_the_sandbox():
    with pytest.raises((CheckpointError, InvalidRequest)):
        ChatTemplate("{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}")


def test_generation_marks_and_json_are_rendered_as_hugging_face_does():
    template = ChatTemplate("{% generation %}{{ messages[0].content }}{% endgeneration %}{{ tools | tojson }}")
    prompt = template.render([{"role": "user", "content": "é"}], tools=[{"z": "ü<&>", "a": 1}])
    assert prompt == 'é[{"z": "ü<&>", "a": 1}]'
