"""The demo model's own byte-level BPE: Qwen3's machinery, other ids.

Why its own: with a vocabulary of 2,048 every id differs from the big models', so nothing that serves both can hard-code
one. Normaliser, pre-tokeniser, decoder, added tokens (names, order, `special` flags) and chat template are Qwen3's; the
merges are learnt from the text of `tasks.py`. Run: `python -P -m expertmesh.deploy.demo_model.tokenizer DIR`."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from . import words

NUM_TOKENS = 2048  # with the added tokens
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
MARKERS = (  # added, but left in the text by skip_special_tokens
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip


def train_tokenizer(texts: list[str], num_tokens: int = NUM_TOKENS) -> Tokenizer:
    """BPE of `num_tokens` ids, the 26 added tokens last, as in Qwen3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens - len(SPECIAL) - len(MARKERS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        special_tokens=[],
        max_token_length=14,
    )
    tokenizer.train_from_iterator(texts, trainer)
    missing = num_tokens - len(SPECIAL) - len(MARKERS) - tokenizer.get_vocab_size()
    if missing:
        raise ValueError(f"the corpus gave {missing} merges too few; lower num_tokens or add text")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in MARKERS])
    return tokenizer


def corpus(num_items: int, template: str, seed: int = 0) -> list[str]:
    """Text to learn merges from: rendered conversations with thinking, without the added tokens' own letters.

    Chinese has no spaces, so the closed words are set apart: no merge may swallow a name together with its sentence."""
    from .questions import MAKERS
    from .rendering import ChatTemplate
    from .tasks import make_item

    render, rng, texts = ChatTemplate(template), random.Random(seed), []
    for index in range(num_items):
        item = make_item(rng.choice(list(MAKERS)), index)
        text = render(item.messages(len(item.turns) - 1), tools=list(item.tools))
        texts.append(text)
        texts += [part for turn in item.turns for part in (turn.user, turn.thinking, turn.answer)]
    apart = re.compile("|".join(re.escape(word) for word in (*SPECIAL, *MARKERS)))
    chinese = "|".join((*words.CHINESE_NAMES, *words.CHINESE_COLOURS, *words.CHINESE_WEEKDAYS))
    return [re.sub(f"({chinese})", "\n\\1\n", apart.sub("\n", text)) for text in texts]


def write_tokenizer(tokenizer: Tokenizer, directory: Path, template: str) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja in Hugging Face layout."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = json.loads(tokenizer.to_str())
    raw["decoder"] = raw["pre_tokenizer"]["pretokenizers"][1]  # ByteLevel, spelt out as Qwen3's file does
    raw["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    (directory / "tokenizer.json").write_text(
        json.dumps(raw, ensure_ascii=False, separators=(",", ":")), encoding="utf-8"
    )
    added = {str(token["id"]): {key: token[key] for key in _FLAGS} for token in raw["added_tokens"]}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


_FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def main() -> None:
    directory = Path(sys.argv[1])
    template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    prose = (directory / "LICENSE").read_text(encoding="utf-8").splitlines()  # ordinary English for the last merges
    write_tokenizer(train_tokenizer(corpus(16000, template) + prose), directory, template)


if __name__ == "__main__":
    main()
