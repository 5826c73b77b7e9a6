"""One expert's index finds what brute force over its whole scores finds."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeret.config import IndexConfig
from moeret.data.lexical import Counts, Lexical, Statistics, stems
from moeret.models.memory import NEIGHBOURS, Blend, Memory, digest
from moeret.retrieval import expert_index
from moeret.retrieval.expert_index import ExpertIndex, Part
from moeret.retrieval.hnsw import build_vector_index
from moeret.retrieval.segment import Answers
from moeret.types import Document

FIRST, WIDTH, WORDS = 7, 8, ["iron", "gold", "zinc", "pear", "plum", "fig", "rhine", "nile"]


def unit(random, count):
    vectors = random.normal(size=(count, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make(seed, documents=60, queries=50, cuts=(), dead=(), **config):
    """(index, its live documents, their vectors, its memory); `cuts` are where the documents fall into parts."""
    random = np.random.default_rng(seed)
    corpus = [Document(f"d{n}", " ".join(random.choice(WORDS, 4)) + f" {n % 40}") for n in range(documents)]
    vectors = unit(random, documents)
    vectors[1] = vectors[0]
    answers = [random.choice(documents, random.integers(1, 4), replace=False) for _ in range(queries)]
    memory = Memory.of(unit(random, queries), [[corpus[row].contents for row in own] for own in answers])
    live = ~np.isin(np.arange(documents), dead)
    index = index_of(corpus, vectors, memory, IndexConfig(**config), cuts, live)
    kept = [own for own, alive in zip(corpus, live, strict=True) if alive]
    return index, kept, vectors[live], memory


def index_of(corpus, vectors, memory, settings, cuts=(), live=None, first=FIRST):
    """An index of documents in parts, of which some are live."""
    live = np.ones(len(corpus), bool) if live is None else live
    places = [slice(*own) for own in pairwise([0, *cuts, len(corpus)]) if live[slice(*own)].any()]
    counts = [Counts.of([own.contents for own in corpus[place]]) for place in places]
    together = Statistics.of(zip(counts, [live[place] for place in places], strict=True))
    parts = []
    for own, place in zip(counts, places, strict=True):
        contents = [document.contents for document in corpus[place]]
        vector_index, answers = build_vector_index(vectors[place], settings), Answers(*memory.answers(contents))
        alive = None if live[place].all() else vector_index.allow(live[place])
        parts.append(Part(first, vector_index, Lexical(own, together), answers, alive))
        first += int(live[place].sum())
    return ExpertIndex(tuple(parts), build_vector_index(memory.queries.astype(np.float32), settings))


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
    st.lists(st.integers(1, 59), max_size=3, unique=True).map(sorted),
    st.sets(st.integers(0, 59), max_size=40),
)
@settings(deadline=None, max_examples=60)
def test_hits_are_the_best_by_the_whole_score(seed, lexical, memory, k, exact_below, cuts, dead):
    """With so few documents that all are candidates; whatever parts they lie in, and of which some are deleted."""
    index, corpus, vectors, kept = make(seed, exact_below=exact_below, cuts=cuts, dead=sorted(dead))
    blend, words = Blend(lexical, memory), stems(["gold of the rhine", "of the", "unheard"])
    queries = unit(np.random.default_rng(seed + 1), 3)
    for (rows, scores), vector, own in zip(index.search(queries, words, [blend] * 3, k), queries, words, strict=True):
        every = by_hand(corpus, vectors, kept, vector, own, blend)
        assert len(rows) == len(set(rows.tolist())) == min(k, len(corpus))
        np.testing.assert_allclose(scores, every[rows - FIRST], atol=1e-5)
        np.testing.assert_allclose(scores, np.sort(every)[::-1][:k], atol=1e-5)


def test_no_query_is_searched_otherwise_because_of_its_neighbours_in_a_batch():
    """A graph that few links and a short list make miss much: more candidates for one query must not help another."""
    index, *_ = make(0, documents=400, exact_below=0, ef=2, M=2, ef_construction=4)
    queries, words = unit(np.random.default_rng(1), 30), stems(["gold"] * 30)
    blends = [Blend(0.1, 0.5) if row % 3 == 0 else Blend() for row in range(30)]
    together = index.search(queries, words, blends, 2)
    for row in range(30):
        [alone] = index.search(queries[[row]], words[row : row + 1], blends[row : row + 1], 2)
        np.testing.assert_array_equal(together[row][0], alone[0])
        np.testing.assert_allclose(together[row][1], alone[1], atol=1e-6)
        if row % 3:
            np.testing.assert_array_equal(alone[0], FIRST + index.parts[0].vectors.search(queries[[row]], 2)[0][0])


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


def test_only_what_is_allowed_is_found_and_all_of_it():
    index, corpus, vectors, memory = make(4, cuts=(20, 45), dead=(3, 30))
    random = np.random.default_rng(5)
    sizes = [len(part.vectors.rows) for part in index.parts]
    for share in (0.0, 0.1, 0.6):
        allowed = [random.random(size) < share for size in sizes]
        for own, part in zip(allowed, index.parts, strict=True):
            own &= True if part.live is None else part.live.rows
        numbers = np.concatenate([p.numbered(np.flatnonzero(own)) for p, own in zip(index.parts, allowed, strict=True)])
        filters = [part.vectors.allow(own) for part, own in zip(index.parts, allowed, strict=True)]
        for blend in (Blend(), Blend(0.3, 0.5)):
            queries, words = unit(random, 3), stems(["gold of the rhine"] * 3)
            for vector, (rows, scores) in zip(
                queries, index.search(queries, words, [blend] * 3, 9, filters), strict=True
            ):
                every = by_hand(corpus, vectors, memory, vector, words[0], blend)
                assert set(rows.tolist()) <= set(numbers.tolist())
                np.testing.assert_allclose(scores, np.sort(every[numbers - FIRST])[::-1][:9], atol=1e-5)


def test_a_memory_forgets_documents_that_changed_and_knows_each_copy():
    _, corpus, _, memory = make(5)
    answered = {own.tobytes() for own in memory.documents}
    one = next(own for own in corpus[:30] if digest(own.contents) in answered)
    kept = [*corpus[:30], *(Document(own.id, own.text + " new") for own in corpus[30:]), Document("copy", one.text)]
    answers = Answers(*memory.answers([own.contents for own in kept]))
    known = {digest(own.contents) for own in corpus[:30]}
    assert {digest(kept[row].contents) for row in answers.rows} == answered & known
    assert {kept.index(one), len(kept) - 1} <= set(answers.rows.tolist())


def test_what_a_memory_says_of_a_document_does_not_depend_on_the_others():
    index, corpus, vectors, memory = make(8, queries=200)
    part = index_of(corpus[:6], vectors[:6], memory, IndexConfig())
    queries, none, blends = unit(np.random.default_rng(9), 5), [[]] * 5, [Blend(0.0, 1.0)] * 5
    whole = index.search(queries, none, blends, len(corpus))
    for (rows, scores), (all_rows, all_scores) in zip(part.search(queries, none, blends, 6), whole, strict=True):
        said = dict(zip(all_rows.tolist(), all_scores.tolist(), strict=True))
        np.testing.assert_allclose(scores, [said[row] for row in rows.tolist()], atol=1e-5)
