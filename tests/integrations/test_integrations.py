"""Other libraries' retrievers and embeddings give what a Retriever and a Model give."""

import os

import numpy as np
import pytest
from conftest import QUERIES

import moeret
from moeret.integrations.sentence_encoder import SentenceEncoder

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # it reports its use to its makers unless told not to
pytestmark = pytest.mark.filterwarnings("default")  # theirs


@pytest.fixture(scope="module")
def retriever(index_folder):
    return moeret.Retriever.load(index_folder)


@pytest.fixture(scope="module")
def model(model_folder):
    return moeret.Model.load(model_folder)


def test_langchain_retrieves_the_same_documents(retriever):
    pytest.importorskip("langchain_core")
    from moeret.integrations.langchain import MoeretRetriever

    for options in ({}, {"route": "all"}):
        theirs = MoeretRetriever(retriever=retriever, k=4, options=options)
        for query in QUERIES:
            hits = retriever.search(query, 4, **options)
            found = theirs.invoke(query)
            assert [(own.id, own.page_content) for own in found] == [(hit.id, hit.text) for hit in hits]
            assert [own.metadata["expert"] for own in found] == [hit.expert for hit in hits]


def test_langchain_embeds_the_same(model):
    pytest.importorskip("langchain_core")
    from moeret.integrations.langchain import MoeretEmbeddings

    theirs = MoeretEmbeddings(SentenceEncoder(model, "metal"))
    expected = model.encode_query(QUERIES, expert="metal", normalize_embeddings=True)
    np.testing.assert_allclose([theirs.embed_query(query) for query in QUERIES], expected, atol=1e-5)
    documents = model.encode_document(QUERIES, normalize_embeddings=True)
    np.testing.assert_allclose(theirs.embed_documents(QUERIES), documents, atol=1e-5)


def test_llama_index_retrieves_the_same_nodes(retriever):
    pytest.importorskip("llama_index.core")
    from moeret.integrations.llama_index import MoeretRetriever

    theirs = MoeretRetriever(retriever, 4, route="all")
    for query in QUERIES:
        hits = retriever.search(query, 4, route="all")
        found = theirs.retrieve(query)
        assert [(own.node_id, own.text, own.score) for own in found] == [(hit.id, hit.text, hit.score) for hit in hits]


def test_haystack_retrieves_the_same_documents_in_a_pipeline(retriever):
    haystack = pytest.importorskip("haystack")
    from moeret.integrations.haystack import MoeretRetriever

    pipeline = haystack.Pipeline()
    pipeline.add_component("retriever", MoeretRetriever(retriever, 4))
    for query in QUERIES:
        hits = retriever.search(query, 3)
        found = pipeline.run({"retriever": {"query": query, "top_k": 3}})["retriever"]["documents"]
        assert [(own.id, own.content, own.score) for own in found] == [(hit.id, hit.text, hit.score) for hit in hits]


def test_a_sentence_encoder_embeds_as_its_model(model):
    for expert in ("auto", "metal", "shared"):
        encoder = SentenceEncoder(model, expert)
        queries = model.encode_query(QUERIES, expert=expert)
        np.testing.assert_array_equal(encoder.encode_query(QUERIES), queries)
        np.testing.assert_allclose(encoder.encode(QUERIES[1]), queries[1], atol=1e-5)
        np.testing.assert_array_equal(encoder.encode_document(QUERIES), model.encode_document(QUERIES))
    np.testing.assert_array_equal(encoder.encode_query(QUERIES, batch_size=2, convert_to_numpy=True), queries)
    with pytest.raises(moeret.ConfigError, match="numpy"):
        encoder.encode(QUERIES, convert_to_numpy=False)
    assert encoder.encode(QUERIES[0]).shape == (encoder.get_embedding_dimension(),) == (16,)


def test_its_similarity_is_the_cosine(model):
    encoder = SentenceEncoder(model, "fruit")
    one, other = encoder.encode_query(QUERIES) * 3, encoder.encode_document(QUERIES[:2])
    found = encoder.similarity(one, other)
    expected = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in other] for a in one]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert encoder.similarity(one[0], one[0]).shape == (1, 1)


def test_what_is_not_there_is_refused(model):
    with pytest.raises(moeret.ConfigError, match="law"):
        SentenceEncoder(model, "law")
    with pytest.raises(moeret.ConfigError, match="no prompt 'web'"):
        SentenceEncoder(model).encode("x", prompt_name="web")


def test_two_towers_embed_documents_by_the_expert(both):
    model = both.model
    encoder = SentenceEncoder(model, "fruit")
    np.testing.assert_array_equal(encoder.encode_document(QUERIES), model.encode_document(QUERIES, expert="fruit"))


def test_documents_of_two_towers_want_an_expert(both):
    with pytest.raises(moeret.ConfigError, match="name one, not auto"):
        SentenceEncoder(both.model).encode_document(["x"])
