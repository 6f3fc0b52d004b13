"""Promise: what the engine is asked for follows from the request and the checkpoint's files, for every family."""

import pytest
from gateway_world import tokenizer

from expertmesh.errors import ConfigError, InvalidRequest, SessionStoreUnavailable
from expertmesh.proto import expertmesh_pb2 as pb
from expertmesh.router.gateway.generation import GenerationConfig, Generations
from expertmesh.router.gateway.tokenizer import QWEN3_FOLDER, Tokenizer

ON, OFF = pb.ThinkingOptions.ON, pb.ThinkingOptions.OFF


def family(folder, template: str) -> Generations:
    """A checkpoint with Qwen3's tokenizer and this template ("" = none)."""
    for name in ("tokenizer.json", "generation_config.json"):
        (folder / name).symlink_to(QWEN3_FOLDER / name)
    if template:
        (folder / "chat_template.jinja").symlink_to(QWEN3_FOLDER / template)
    return make(Tokenizer(folder))


def make(tok: Tokenizer, vocab_size: int = 151_936, max_model_len: int = 1000) -> Generations:
    config = GenerationConfig(model="m", max_model_len=max_model_len, vocab_size=vocab_size)
    return Generations(config, tokenizer=tok, tier=None, sessions=None)  # type: ignore[arg-type]


def ask(mode: int = 0, budget: int | None = None, **fields) -> pb.GenerateRequest:
    thinking = pb.ThinkingOptions(mode=mode, budget_tokens=budget)
    fields = fields or {"chat": pb.Chat(messages=[pb.Message(role="user", content="hi")])}
    return pb.GenerateRequest(thinking=thinking, **fields)


async def test_a_model_that_never_thinks_refuses_to(tmp_path):
    instruct = family(tmp_path, "chat_template_instruct_2507.jinja")
    with pytest.raises(InvalidRequest, match="never thinks"):
        await instruct.prepare(ask(ON))
    off, default = await instruct.prepare(ask(OFF)), await instruct.prepare(ask())
    assert off.request.prompt_ids == default.request.prompt_ids


async def test_a_model_that_always_thinks_starts_inside_the_block(tmp_path):
    thinking = family(tmp_path, "chat_template_thinking_2507.jinja")
    with pytest.raises(InvalidRequest, match="always thinks"):
        await thinking.prepare(ask(OFF))
    budget = (await thinking.prepare(ask(budget=9))).request.thinking
    assert (budget.starts_inside, budget.budget_tokens) == (True, 9)
    none = (await thinking.prepare(ask(budget=0))).request.thinking
    assert (none.starts_inside, none.budget_tokens) == (True, 0)  # the engine closes the block at once


async def test_a_hybrid_models_budget_starts_outside_and_is_moot_when_switched_off():
    hybrid = make(tokenizer())
    assert not (await hybrid.prepare(ask(budget=5))).request.thinking.starts_inside
    assert (await hybrid.prepare(ask(OFF, budget=5))).request.thinking is None
    assert (await hybrid.prepare(ask(budget=0))).request.thinking is None
    assert (await hybrid.prepare(ask())).request.thinking is None


async def test_a_raw_prompt_that_opened_the_block_is_inside_it():
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    generation = await make(tokenizer()).prepare(ask(budget=3, prompt=text))
    assert generation.request.thinking.starts_inside


async def test_without_a_template_only_prompts_are_served(tmp_path):
    bare = family(tmp_path, "")
    with pytest.raises(InvalidRequest, match="no chat template"):
        await bare.prepare(ask())
    assert (await bare.prepare(ask(prompt="hi"))).request.prompt_ids


async def test_ids_beyond_a_small_models_vocabulary_are_refused():
    small = make(tokenizer(), vocab_size=1000)
    with pytest.raises(InvalidRequest, match="1000 ids"):
        await small.prepare(ask(prompt="tokenization"))
    with pytest.raises(InvalidRequest, match=r"0\.\.999"):
        await small.prepare(ask(token_ids=pb.TokenIds(ids=[1000])))


async def test_a_session_without_a_store_is_unavailable():
    request = ask()
    request.session_id = "s"
    with pytest.raises(SessionStoreUnavailable):
        await make(tokenizer()).prepare(request)


async def test_a_prompt_of_a_megabyte_is_measured_before_it_is_refused():
    with pytest.raises(InvalidRequest, match="at most 999"):
        await make(tokenizer()).prepare(ask(prompt="word " * 200_000))


async def test_what_is_left_of_the_context_bounds_the_output():
    generations = make(tokenizer(), max_model_len=20)
    generation = await generations.prepare(ask(token_ids=pb.TokenIds(ids=[5] * 19)))
    assert generation.request.sampling.max_tokens == 1
    with pytest.raises(InvalidRequest, match="at most 19"):
        await generations.prepare(ask(token_ids=pb.TokenIds(ids=[5] * 20)))


async def test_ignore_eos_leaves_only_the_requests_own_stop_ids():
    sampling = pb.SamplingOptions(ignore_eos=True, stop_token_ids=[7], top_k=10**6)
    request = (await make(tokenizer()).prepare(ask(prompt="a", sampling=sampling))).request
    assert request.sampling.stop_token_ids == {7}
    assert request.sampling.top_k == 151669  # all of the vocabulary


async def test_tools_and_tool_results_reach_the_template():
    messages = [
        pb.Message(role="user", content="weather?"),
        pb.Message(role="assistant", tool_calls=[pb.ToolCall(name="w", arguments_json='{"at": "Köln"}')]),
        pb.Message(role="tool", content="rain"),
    ]
    request = pb.GenerateRequest(chat=pb.Chat(messages=messages), tools=[pb.Tool(name="w", parameters_json="{}")])
    prompt = tokenizer().decode((await make(tokenizer()).prepare(request)).request.prompt_ids, skip_special=False)
    assert '<tool_call>\n{"name": "w", "arguments": {"at": "Köln"}}\n</tool_call>' in prompt
    assert "<tool_response>\nrain\n</tool_response>" in prompt
    assert '{"type": "function", "function": {"name": "w", "description": "", "parameters": {}}}' in prompt


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Enough.",  # the block would stay open at the gateway
        "Enough.</think>",
        "Enough.</think>\n\n.",  # the answer would begin with it
        "Enough.</think>\n\n</think>\n\n",
        "<think>Enough.</think>\n\n",
        "Enough.<|im_end|></think>\n\n",
    ],
)
def test_a_closing_sentence_that_does_not_close_the_block_is_refused_at_start(text):
    config = GenerationConfig(model="m", max_model_len=100, vocab_size=151_936, closing_text=text)
    with pytest.raises(ConfigError, match="thinking_closing_text"):
        Generations(config, tokenizer=tokenizer(), tier=None, sessions=None)  # type: ignore[arg-type]


async def test_forced_tokens_outside_a_small_models_vocabulary_are_refused(tmp_path):
    thinking = family(tmp_path, "chat_template_thinking_2507.jinja")
    small = make(thinking.tokenizer, vocab_size=5000)
    with pytest.raises(InvalidRequest, match="budget_tokens"):
        await small.prepare(ask(budget=3, token_ids=pb.TokenIds(ids=[5])))
