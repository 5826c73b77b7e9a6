"""Queries made from documents."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeret import DataError
from moeret.data.pairs import SPAN, label_free_pairs
from moeret.types import Document

TEXTS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=8, max_size=60).map(" ".join)


@settings(max_examples=50, deadline=None)
@given(st.lists(TEXTS, min_size=2, max_size=8))
def test_a_text_without_a_title_is_asked_for_by_a_span_of_it(texts):
    corpus = [Document(f"d{n}", text) for n, text in enumerate(texts)]
    made, rest = label_free_pairs(corpus)
    assert made.qrels == {document.id: {document.id: 1} for document in corpus}
    for document, left in zip(corpus, rest, strict=True):
        query = made.queries[document.id]
        assert f" {query} " in f" {document.text} "
        assert left.id == document.id and sorted([*query.split(), *left.text.split()]) == sorted(document.text.split())
        assert SPAN[0] <= len(query.split()) <= min(SPAN[1], len(document.text.split()) // 2)


def test_a_title_asks_for_its_text():
    corpus = [Document("a", "x y", "The title"), Document("b", "z", "Another"), Document("c", "", "No text")]
    made, rest = label_free_pairs(corpus)
    assert made.queries == {"a": "The title", "b": "Another"}
    assert rest == [Document("a", "x y"), Document("b", "z"), corpus[2]]


def test_what_a_document_is_asked_by_does_not_depend_on_the_others():
    corpus = [Document(f"d{n}", " ".join(f"w{n * k}" for k in range(20))) for n in range(30)]
    whole, half = label_free_pairs(corpus)[0], label_free_pairs(corpus[::2])[0]
    assert all(whole.queries[id] == query for id, query in half.queries.items())


def test_documents_too_short_to_ask_for_are_an_error():
    with pytest.raises(DataError, match="1 of 2 documents have a title and a text, or a text of 8 words: too few"):
        label_free_pairs([Document("a", "too short"), Document("b", "text", "title")])
