"""Write a CLIP tokenizer with a vocabulary of a few words and all bytes, so that any text can be tokenised."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def write_tokenizer(words: Sequence[str], length: int, folder: Path) -> CLIPTokenizer:
    """Write the files of a tokenizer and load them.

    Args:
        words: Words that become one token each, merged from their letters from left to right.
        length: Number of tokens of a padded text, including start and end.
        folder: Folder to write; `CLIPTokenizer.from_pretrained(folder)` loads it.
    """
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + WORD_END for letter in letters)]
    merges = []
    for word in words:
        parts = [*word[:-1], word[-1] + WORD_END]
        while len(parts) > 1:
            parts[:2], pair = ["".join(parts[:2])], tuple(parts[:2])
            if pair not in merges:
                merges.append(pair)
                tokens.append(parts[0])
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: place for place, token in enumerate((*tokens, START, END))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False, separators=(",", ":")) + "\n")
    (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *map(" ".join, merges))) + "\n")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)
