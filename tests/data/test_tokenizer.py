"""Tokenising: special tokens on, padding off, never too long, the same alone and in company."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.implementations import BertWordPieceTokenizer

from moeret.data import tokenizer as module
from moeret.data.tokenizer import Tokenizer
from moeret.errors import BaseEncoderError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "apple", "Apple", "pear", "##s", "fig", "a", "."]
CLS, SEP, UNKNOWN = 2, 3, 1
MAX_LENGTH = 6
TEXTS = ["apple", "pears fig.", "", "   ", "a " * 50, "Apple PEAR", "🙂", "שלום", "a\0b", "fig" * 200, "x\u2028y"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary as BERT has one."""
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    """Its tokenizer, with short texts only."""
    return Tokenizer(folder, MAX_LENGTH)


def same(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return [own.tolist() for own in some] == [own.tolist() for own in others]


def check(ids: np.ndarray) -> None:
    assert ids.dtype == np.int32
    assert 1 <= len(ids) <= MAX_LENGTH
    assert ids[0] == CLS
    assert ids[-1] == SEP
    assert (ids >= 0).all()
    assert (ids < len(WORDS)).all()


def test_words_and_pieces_stand_between_the_special_tokens(tokenizer):
    assert tokenizer(["apple", "pears fig."])[0].tolist() == [CLS, 5, SEP]
    assert tokenizer(["pears fig."])[0].tolist() == [CLS, 7, 8, 9, 11, SEP]
    assert tokenizer.vocabulary == len(WORDS)
    assert tokenizer.max_length == MAX_LENGTH


def test_odd_and_empty_texts_have_at_least_the_special_tokens(tokenizer):
    for ids in tokenizer(TEXTS):
        check(ids)
    assert tokenizer(["", "  "])[0].tolist() == [CLS, SEP]
    assert tokenizer([]) == []


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_can_be_tokenised(tokenizer, text):
    check(tokenizer([text])[0])


def test_long_texts_are_cut_at_the_end_and_keep_the_closing_token(folder, tokenizer):
    long = tokenizer(["apple pear " * 100])[0]
    assert long.tolist() == [CLS, 5, 7, 5, 7, SEP]
    assert len(Tokenizer(folder, 100)(["apple " * 200])[0]) == 100


def test_a_text_has_the_same_ids_alone_and_in_company(tokenizer, monkeypatch):
    alone = [tokenizer([text])[0] for text in TEXTS]
    assert same(tokenizer(TEXTS), alone)
    monkeypatch.setattr(module, "_CHUNK", 3)
    assert same(tokenizer(TEXTS), alone)


def test_padding_and_truncation_of_a_saved_tokenizer_are_overruled(folder, tokenizer, tmp_path):
    saved = BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)
    saved.enable_padding(length=32)
    saved.enable_truncation(3)
    saved.save(str(tmp_path / "tokenizer.json"))
    assert same(Tokenizer(tmp_path, MAX_LENGTH)(TEXTS), tokenizer(TEXTS))


def test_a_cased_vocabulary_stays_cased(folder, tokenizer, tmp_path):
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert Tokenizer(tmp_path, MAX_LENGTH)(["Apple", "PEAR"])[0].tolist() == [CLS, 6, SEP]
    assert Tokenizer(tmp_path, MAX_LENGTH)(["PEAR"])[0].tolist() == [CLS, UNKNOWN, SEP]
    assert tokenizer(["Apple"])[0].tolist() == [CLS, 5, SEP]


def test_the_base_of_the_other_tests_has_a_tokenizer(base_folder):
    ids = Tokenizer(base_folder, 64)(["find the apple nick10"])[0]
    assert len(ids) == 6


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt", "tokenizer_config.json"])
def test_a_tokenizer_that_is_damaged_is_an_error_of_the_base(folder, tmp_path, file):
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    (tmp_path / file).write_bytes(b"\xff{")
    with pytest.raises(BaseEncoderError, match="cannot load the tokenizer in .*" + tmp_path.name):
        Tokenizer(tmp_path, MAX_LENGTH)


def test_a_folder_without_a_tokenizer_is_an_error_that_says_what_is_missing(tmp_path):
    with pytest.raises(BaseEncoderError, match=r"expected tokenizer\.json or vocab\.txt"):
        Tokenizer(tmp_path, MAX_LENGTH)
