"""BM25 is bm25s's, whole, repeatable, and never a reason to fail."""

import os
import subprocess
import sys

import bm25s
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from moeret.data.lexical import Counts, Lexical, Statistics, best, stems

WORDS = ["apple", "apples", "pie", "the", "of", "iron", "Zürich", "naïve", "42", "x", "c++", "running", "ran", ""]
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join), min_size=1, max_size=8)


@given(TEXTS, st.lists(st.sampled_from([*WORDS, "quince"]), max_size=5).map(" ".join))
@settings(deadline=None)
def test_scores_are_those_of_bm25s_and_zero_where_no_word_is_shared(texts, query):
    [words] = stems([query])
    scores = Lexical.of(texts).scores(words)
    documents = stems(texts)
    shared = [bool(set(own) & set(words)) for own in documents]
    assert scores.shape == (len(texts),) and scores.dtype == np.float32
    np.testing.assert_array_equal(scores > 0, shared)
    if any(shared):
        peer = bm25s.BM25(k1=1.2, b=0.75)
        peer.index(documents, show_progress=False)
        np.testing.assert_allclose(scores, peer.get_scores(words), rtol=1e-5)


@given(TEXTS)
@settings(deadline=None, max_examples=20)
def test_a_file_keeps_all_of_it(tmp_path_factory, texts):
    file = tmp_path_factory.mktemp("lexical") / "words.safetensors"
    made = Counts.of(texts)
    save_file(made.tensors, file)
    assert_equal(Counts.from_tensors(load_file(file)), made)


def assert_equal(one: Counts, other: Counts) -> None:
    assert one.terms == other.terms
    for name in ("indptr", "indices", "counts", "lengths"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype


@given(st.lists(st.tuples(TEXTS, st.integers(0, 255)), min_size=1, max_size=3))
@settings(deadline=None, max_examples=40)
def test_parts_without_what_was_left_out_are_joined_as_if_counted_together(parts):
    texts = [own for own, _ in parts]
    kept = [np.array([bool(bits >> place & 1) for place in range(len(own))]) for own, bits in parts]
    left = [text for own, mask in zip(texts, kept, strict=True) for text, keep in zip(own, mask, strict=True) if keep]
    joined = Counts.joined([Counts.of(own) for own in texts], kept)
    assert_equal(joined, Counts.of(left))


@given(st.lists(st.tuples(TEXTS, st.integers(0, 255)), min_size=1, max_size=3))
@settings(deadline=None, max_examples=40)
def test_parts_score_their_live_documents_as_the_whole_does(parts):
    """However documents are spread over parts, and whatever else once stood beside them."""
    counts = [Counts.of(own) for own, _ in parts]
    live = [np.array([bool(bits >> place & 1) for place in range(len(own))]) for own, bits in parts]
    together = Statistics.of(zip(counts, live, strict=True))
    assert Statistics.from_tensors(together.tensors) == together
    whole = Lexical.of([text for (own, _), mask in zip(parts, live, strict=True) for text in np.array(own)[mask]])
    for words in stems(WORDS):
        found = [Lexical(own, together).scores(words)[mask] for own, mask in zip(counts, live, strict=True)]
        np.testing.assert_array_equal(np.concatenate(found), whole.scores(words))


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0])), st.integers(1, 5))
def test_the_best_are_the_highest_above_zero(values, count):
    scores = np.array(values, np.float32)
    found = scores[best(scores, count)]
    assert sorted(found.tolist(), reverse=True) == sorted((v for v in values if v > 0), reverse=True)[:count]


def test_every_process_counts_alike():
    """Python orders sets of strings anew in each process, and an index must be the same bytes in every build."""
    program = (
        "import hashlib; from moeret.data.lexical import Counts;"
        "own = Counts.of(['gold and tin', 'a tin of iron pears', 'pears']).tensors;"
        "print(hashlib.sha256(b''.join(own[name].tobytes() for name in sorted(own))).hexdigest())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(seen) == 1
