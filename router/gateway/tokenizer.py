"""Text to ids and back for any checkpoint folder in Hugging Face layout, on `tokenizers` alone.

Why not transformers: its import takes seconds and a gateway starts on every node. Why bytes: every Qwen3 token is a
byte string (byte-level BPE), so decoding is a table look-up per id and one incremental UTF-8 decoder per stream. That
is O(1) a token, never splits a character, and equals the whole-text decode of `tokenizers`: both replace each maximal
invalid part by U+FFFD.

No id is written in this file: think, end-of-think, tool and end-of-sequence ids are looked up by their text."""

import codecs
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import tokenizers

from ...errors import CheckpointError

QWEN3_FOLDER = Path(str(files(__package__) / "qwen3"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialIds:
    """Ids found by their text; None where the vocabulary has no such token."""

    eos: frozenset[int]  # any of these ends a turn
    special: frozenset[int]  # left out of decoded text
    think: int | None
    end_think: int | None
    tool_call: int | None
    end_tool_call: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Sampling of generation_config.json; greedy where `do_sample` is not set, as Hugging Face reads it."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class Tokenizer:
    """Thread-safe once made. `checkpoint` is where generation_config.json and config.json are, by default `folder`."""

    def __init__(self, folder: str | Path, *, checkpoint: str | Path | None = None) -> None:
        self.folder = Path(folder)
        self.checkpoint = self.folder if checkpoint is None else Path(checkpoint)
        self._config = _read_json(self.folder / "tokenizer_config.json")
        generation = _read_json(self.checkpoint / "generation_config.json")
        self._tokenizer = _load(self.folder / "tokenizer.json", self._config)
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.special_tokens = _special_token_texts(self._config)
        self.chat_template = _chat_template(self.folder, self._config)
        self.defaults = _defaults(generation)
        self.special_ids = self._find_special_ids(generation)
        self.added_ids = frozenset(self._tokenizer.get_added_tokens_decoder())  # tokens that no text is encoded from
        self._pieces: dict[int, bytes] = {}
        self._texts: dict[int, str | None] = {}

    @classmethod
    def for_checkpoint(cls, folder: str | Path) -> "Tokenizer":
        """The folder's own tokenizer, else the Qwen3 one that this package carries."""
        own = (Path(folder) / "tokenizer.json").exists()
        return cls(folder) if own else cls(QWEN3_FOLDER, checkpoint=folder)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Whole text at once; incomplete UTF-8 becomes U+FFFD."""
        special = self.special_ids.special if skip_special else frozenset()
        return b"".join(self.piece(i) for i in token_ids if i not in special).decode("utf-8", "replace")

    def piece(self, token_id: int) -> bytes:
        """The bytes of one token; empty for an id that the tokenizer does not know (padding rows of the embedding)."""
        piece = self._pieces.get(token_id)
        if piece is None:
            token = self._tokenizer.id_to_token(token_id)
            piece = self._pieces[token_id] = b"" if token is None else _token_bytes(token)
        return piece

    def text(self, token_id: int) -> str | None:
        """The text of a token that is whole characters by itself (nearly all are), else None."""
        try:
            return self._texts[token_id]
        except KeyError:
            try:
                text = self.piece(token_id).decode("utf-8")
            except UnicodeDecodeError:
                text = None
            return self._texts.setdefault(token_id, text)

    def token_id(self, text: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(text)
        return found

    def _find_special_ids(self, generation: dict[str, Any]) -> SpecialIds:
        added = self._tokenizer.get_added_tokens_decoder()
        eos = generation.get("eos_token_id")
        if eos is None:
            eos = _read_json(self.checkpoint / "config.json").get("eos_token_id")
        if eos is None and (text := self.special_tokens.get("eos_token")):
            eos = self.token_id(text)
        return SpecialIds(
            eos=frozenset() if eos is None else frozenset(eos if isinstance(eos, list) else [eos]),
            special=frozenset(i for i, token in added.items() if token.special),
            think=self.token_id("<think>"),
            end_think=self.token_id("</think>"),
            tool_call=self.token_id("<tool_call>"),
            end_tool_call=self.token_id("</tool_call>"),
        )


class Detokenizer:
    """Ids of one stream to text as they come; a character whose bytes are not all there yet is held back."""

    __slots__ = ("_decoder", "_held", "_special", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._special = tokenizer.special_ids.special if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = False  # the decoder holds the beginning of a character

    def plain(self, token_id: int) -> str | None:
        """The token's text if it is whole characters and nothing is held back, else None: then `push` it."""
        return None if self._held or token_id in self._special else self._tokenizer.text(token_id)

    def push(self, token_id: int) -> str:
        if token_id in self._special:
            return ""
        if not self._held:
            text = self._tokenizer.text(token_id)
            if text is not None:
                return text
        text = self._decoder.decode(self._tokenizer.piece(token_id))
        self._held = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """The end of a text: what was held back becomes U+FFFD; the next push begins a new text."""
        if not self._held:
            return ""
        self._held = False
        return self._decoder.decode(b"", True)


def decode_stream(tokenizer: Tokenizer, token_ids: Sequence[int], *, skip_special: bool = True) -> list[str]:
    """Pieces of text, one a token and one for the end; joined they equal `Tokenizer.decode`."""
    detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
    return [*(detokenizer.push(i) for i in token_ids), detokenizer.flush()]


def _load(path: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    if not path.exists():
        raise CheckpointError("no tokenizer; copy the model's tokenizer files into its folder", file=str(path))
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"unreadable tokenizer: {error}; fetch the file again", file=str(path)) from error
    if "ByteLevel" not in repr(tokenizer.decoder):
        raise CheckpointError("the tokenizer is not byte-level, as that of every Qwen3 model is", file=str(path))
    for token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        _add_missing(tokenizer, *token)
    return tokenizer


def _add_missing(tokenizer: tokenizers.Tokenizer, token_id: str, token: dict[str, Any]) -> None:
    """tokenizer_config.json may name added tokens that tokenizer.json lacks."""
    if tokenizer.token_to_id(token["content"]) is None:
        flags = {k: token[k] for k in ("single_word", "lstrip", "rstrip", "normalized", "special") if k in token}
        tokenizer.add_tokens([tokenizers.AddedToken(token["content"], **flags)])
        if tokenizer.token_to_id(token["content"]) != int(token_id):
            raise CheckpointError(
                f"added token {token['content']!r} should have id {token_id}; tokenizer.json and tokenizer_config.json "
                "do not belong together",
                file="tokenizer_config.json",
            )


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    if (path := folder / "chat_template.jinja").exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    return template


def _special_token_texts(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` ... as the template sees them."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _defaults(generation: dict[str, Any]) -> GenerationDefaults:
    penalty = float(generation.get("repetition_penalty") or 1.0)
    if not generation.get("do_sample", False):
        return GenerationDefaults(repetition_penalty=penalty)
    return GenerationDefaults(
        temperature=float(generation.get("temperature", 1.0)),
        top_p=float(generation.get("top_p", 1.0)),
        top_k=int(generation.get("top_k") or 0),
        min_p=float(generation.get("min_p") or 0.0),
        repetition_penalty=penalty,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"not readable as JSON: {error}", file=str(path)) from error
    if not isinstance(value, dict):
        raise CheckpointError("expected a JSON object", file=str(path))
    return value


@cache
def _byte_of_char() -> dict[str, int]:
    """The printable stand-ins of bytes in byte-level BPE: printable Latin-1 is itself, others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _token_bytes(token: str) -> bytes:
    """Bytes of a token's stand-ins; a token with any other character is an added one and means its own text."""
    table = _byte_of_char()
    try:
        return bytes([table[char] for char in token])
    except KeyError:
        return token.encode("utf-8")
