"""Promise: ids and text are those of the official tokenizer, whole or streamed, and no character is ever split."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.errors import CheckpointError
from expertmesh.router.gateway.tokenizer import QWEN3_FOLDER, Tokenizer, decode_stream

VECTORS = Path(__file__).parent / "data" / "qwen3"


def read_vectors(name: str) -> list[dict]:
    return [json.loads(line) for line in (VECTORS / f"{name}_vectors.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def qwen3() -> Tokenizer:
    return Tokenizer(QWEN3_FOLDER)


def test_every_text_vector_encodes_to_the_official_ids(qwen3):
    vectors = read_vectors("text")
    wrong = [v["id"] for v in vectors if qwen3.encode(v["text"]) != v["ids"]]
    assert not wrong
    assert len(vectors) >= 140


def test_every_decode_vector_is_exact_whole_and_streamed(qwen3):
    vectors = read_vectors("decode")
    for v in vectors:
        assert qwen3.decode(v["ids"], skip_special=False) == v["text"], v["id"]
        assert qwen3.decode(v["ids"]) == v["text_skip_special"], v["id"]
        assert "".join(decode_stream(qwen3, v["ids"], skip_special=False)) == v["text"], v["id"]
        assert "".join(decode_stream(qwen3, v["ids"])) == v["text_skip_special"], v["id"]
    assert len(vectors) >= 40


def test_special_ids_are_found_by_text(qwen3):
    ids = qwen3.special_ids
    assert qwen3.vocab_size == 151669
    assert ids.eos == {151645, 151643}
    assert (ids.think, ids.end_think, ids.tool_call, ids.end_tool_call) == (151667, 151668, 151657, 151658)
    assert 151667 not in ids.special
    assert 151644 in ids.special


def test_defaults_come_from_the_generation_config(qwen3, tmp_path):
    assert (qwen3.defaults.temperature, qwen3.defaults.top_k, qwen3.defaults.top_p) == (0.6, 20, 0.95)
    (tmp_path / "tokenizer.json").symlink_to(QWEN3_FOLDER / "tokenizer.json")
    bare = Tokenizer(tmp_path)
    assert bare.defaults.temperature == 0.0
    assert bare.chat_template is None
    assert bare.special_ids.eos == frozenset()


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 151668), max_size=30))
def test_streamed_text_equals_the_librarys_whole_decode(ids):
    tokenizer = _shared()
    for skip in (True, False):
        whole = tokenizer._tokenizer.decode(ids, skip_special_tokens=skip)
        assert (
            "".join(decode_stream(tokenizer, ids, skip_special=skip))
            == whole
            == tokenizer.decode(ids, skip_special=skip)
        )


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_a_streamed_piece_never_ends_inside_a_character(text):
    tokenizer = _shared()
    pieces = decode_stream(tokenizer, tokenizer.encode(text), skip_special=False)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


def test_ids_beyond_the_vocabulary_have_no_text(qwen3):
    assert qwen3.decode([151900, 9707]) == "Hello"


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}'])
def test_a_broken_tokenizer_names_the_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_a_folder_without_tokenizer_falls_back_to_the_packaged_one(tmp_path):
    assert Tokenizer.for_checkpoint(tmp_path).folder == QWEN3_FOLDER


_TOKENIZERS: list[Tokenizer] = []


def _shared() -> Tokenizer:
    if not _TOKENIZERS:
        _TOKENIZERS.append(Tokenizer(QWEN3_FOLDER))
    return _TOKENIZERS[0]
