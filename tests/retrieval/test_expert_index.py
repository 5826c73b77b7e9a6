"""One expert's index finds what brute force over its whole scores finds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeret.config import IndexConfig
from moeret.data.lexical import Lexical, stems
from moeret.models.memory import NEIGHBOURS, Blend, Memory, digest
from moeret.retrieval import expert_index
from moeret.retrieval.expert_index import ExpertIndex, build_recall
from moeret.retrieval.hnsw import build_segment
from moeret.types import Document

FIRST, WIDTH, WORDS = 7, 8, ["iron", "gold", "zinc", "pear", "plum", "fig", "rhine", "nile"]


def unit(random, count):
    vectors = random.normal(size=(count, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make(seed, documents=60, queries=50, **config):
    """(index, its documents, their vectors, its memory)."""
    random = np.random.default_rng(seed)
    corpus = [Document(f"d{n}", " ".join(random.choice(WORDS, 4)) + f" {n % 40}") for n in range(documents)]
    vectors = unit(random, documents)
    vectors[1] = vectors[0]
    answers = [random.choice(documents, random.integers(1, 4), replace=False) for _ in range(queries)]
    held = b"".join(digest(corpus[row].contents) for own in answers for row in own)
    memory = Memory(
        unit(random, queries).astype(np.float16),
        np.cumsum([0, *map(len, answers)]),
        np.frombuffer(held, np.uint8).reshape(-1, 16),
    )
    settings = IndexConfig(**config)
    segment = build_segment(vectors, np.arange(FIRST, FIRST + documents), settings)
    lexical = Lexical.of([document.contents for document in corpus])
    return (
        ExpertIndex(FIRST, segment, lexical, build_recall(memory, corpus, FIRST, settings)),
        corpus,
        vectors,
        memory,
    )


def by_hand(corpus, vectors, memory, vector, words, blend):
    """Every document's whole score."""
    scores = vectors @ vector + np.float32(blend.lexical) * Lexical.of([own.contents for own in corpus]).scores(words)
    near = memory.queries.astype(np.float32) @ vector
    best = np.argsort(-near, kind="stable")[:NEIGHBOURS]
    value = {}
    for query in best:
        for own in memory.documents[memory.offsets[query] : memory.offsets[query + 1]]:
            value[bytes(own)] = max(value.get(bytes(own), 0.0), float(near[query] - near[best].min()))
    return scores + np.array([blend.memory * value.get(digest(own.contents), 0.0) for own in corpus], np.float32)


@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.02, 1.0]),
    st.sampled_from([0.0, 0.4, 3.0]),
    st.integers(1, 70),
    st.sampled_from([0, 10_000]),
)
@settings(deadline=None, max_examples=40)
def test_hits_are_the_best_by_the_whole_score(seed, lexical, memory, k, exact_below):
    index, corpus, vectors, kept = make(seed, exact_below=exact_below)
    blend, words = Blend(lexical, memory), stems(["gold of the rhine", "of the", "unheard"])
    queries = unit(np.random.default_rng(seed + 1), 3)
    for (rows, scores), vector, own in zip(index.search(queries, words, [blend] * 3, k), queries, words, strict=True):
        every = by_hand(corpus, vectors, kept, vector, own, blend)
        assert len(rows) == len(set(rows.tolist())) == min(k, len(corpus))
        np.testing.assert_allclose(scores, every[rows - FIRST], atol=1e-5)
        np.testing.assert_allclose(scores, np.sort(every)[::-1][:k], atol=1e-5)


def test_a_query_without_a_blend_is_searched_by_its_vector_beside_others_that_have_one():
    index, *_ = make(0)
    queries, words = unit(np.random.default_rng(1), 3), stems(["gold", "iron", "fig"])
    blends = [Blend(), Blend(0.1, 0.5), Blend()]
    mixed, plain = index.search(queries, words, blends, 5), index.segment.search(queries, 5)
    for row in (0, 2):
        for one, other in zip(mixed[row], plain[row], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
    assert mixed[1][0].tolist() != plain[1][0].tolist()


def test_a_document_that_only_its_words_or_only_its_memory_find_is_found(monkeypatch):
    monkeypatch.setattr(expert_index, "CANDIDATES", 1)
    index, corpus, vectors, memory = make(3)
    [words] = stems(["gold gold gold"])
    for blend in (Blend(100.0, 0.0), Blend(0.0, 5.0)):
        found_by_vector = 0
        for row, vector in enumerate(vectors):
            every = by_hand(corpus, vectors, memory, vector, words, blend)
            [(rows, _)] = index.search(vector[None], [words], [blend], 1)
            assert every[rows[0] - FIRST] == pytest.approx(every.max(), rel=1e-5)
            found_by_vector += rows[0] - FIRST == row
        assert found_by_vector < len(vectors) / 2


def test_a_memory_forgets_documents_that_changed_and_knows_each_copy():
    _, corpus, _, memory = make(5)
    kept = [
        *corpus[:30],
        *(Document(own.id, own.text + " new") for own in corpus[30:]),
        Document("copy", corpus[0].text),
    ]
    recall = build_recall(memory, kept, FIRST, IndexConfig())
    known = {digest(own.contents) for own in corpus[:30]}
    answered = {bytes(own) for own in memory.documents} & known
    assert {digest(kept[row - FIRST].contents) for row in recall.rows} == answered
    if digest(corpus[0].contents) in answered:
        assert FIRST + len(kept) - 1 in recall.rows and FIRST in recall.rows
    assert build_recall(memory, [Document("other", "none of these")], 0, IndexConfig()) is None
