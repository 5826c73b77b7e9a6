"""Text to token ids: the only importer of `tokenizers`."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.implementations import BertWordPieceTokenizer

from moeret.errors import BaseEncoderError

_CHUNK = 1024
"""Texts tokenised at a time: bounds the memory that encodings of long texts hold."""


class Tokenizer:
    """A base encoder's tokenizer: special tokens on, padding off, truncated to `max_length` tokens."""

    def __init__(self, folder: Path, max_length: int):
        self._fast = _load(folder)
        self._fast.no_padding()
        self._fast.enable_truncation(max_length)
        self.vocabulary = self._fast.get_vocab_size()
        self.max_length = max_length

    def __call__(self, texts: Sequence[str]) -> list[Int[np.ndarray, "L"]]:
        """Token ids of each text, [L] int32 with 1 <= L <= max_length."""
        ids: list[np.ndarray] = []
        for start in range(0, len(texts), _CHUNK):
            encodings = self._fast.encode_batch(list(texts[start : start + _CHUNK]))
            ids.extend(np.asarray(encoding.ids, np.int32) for encoding in encodings)
        return ids


def _load(folder: Path) -> FastTokenizer:
    file, vocabulary = folder / "tokenizer.json", folder / "vocab.txt"
    try:
        if file.is_file():
            return FastTokenizer.from_file(str(file))
        if vocabulary.is_file():
            settings_file = folder / "tokenizer_config.json"
            settings = json.loads(settings_file.read_text()) if settings_file.is_file() else {}
            lowercase = settings.get("do_lower_case", True)
            # The implementation wraps the tokenizer proper, which is what the other branch returns too.
            return FastTokenizer.from_str(BertWordPieceTokenizer(str(vocabulary), lowercase=lowercase).to_str())
    except Exception as error:  # tokenizers raises bare Exception
        raise BaseEncoderError(f"cannot load the tokenizer in {folder}: {error}") from None
    raise BaseEncoderError(f"{folder} has no tokenizer: expected tokenizer.json or vocab.txt")
