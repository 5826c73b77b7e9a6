"""Both clients give what a Retriever gives."""

import asyncio
import threading

import numpy as np
import pytest
import uvicorn
from conftest import QUERIES

import moeret
from moeret.config import ServeConfig
from moeret.serving.app import make_app
from moeret.serving.client import AsyncClient, Client, ServiceError


@pytest.fixture(scope="module")
def served(index_folder):
    """A Retriever, and the address of a service of its index."""
    retriever = moeret.Retriever.load(index_folder)
    config = uvicorn.Config(make_app(retriever, ServeConfig(reload_every=0)), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.01)
    yield retriever, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def same(mine, theirs):
    assert [(hit.id, hit.rank, hit.text, hit.expert, hit.metadata) for hit in mine] == [
        (hit.id, hit.rank, hit.text, hit.expert, hit.metadata) for hit in theirs
    ]
    np.testing.assert_allclose([hit.score for hit in mine], [hit.score for hit in theirs], atol=1e-5)


def test_the_client_gives_what_the_retriever_gives(served):
    retriever, url = served
    with Client(url) as client:
        for query in QUERIES:
            same(client.search(query, 5), retriever.search(query, 5))
        same(client.search(QUERIES[0], route="base"), retriever.search(QUERIES[0], route="base"))
        assert client.route(QUERIES[0]).experts == pytest.approx(retriever.route(QUERIES[:1])[0].experts, abs=1e-5)
        vectors = client.encode_query(QUERIES, expert="metal")
        expected = retriever.model.encode_query(QUERIES, expert="metal", normalize_embeddings=True)
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        documents = retriever.model.encode_document(QUERIES, expert="base", normalize_embeddings=True)
        np.testing.assert_allclose(client.encode_document(QUERIES), documents, atol=1e-5)
        sets = {"in": {"law", "jobs"}}
        assert client.search("gold", np.int64(3), where={"part": sets}) == retriever.search(
            "gold", 3, where={"part": sets}
        )
        with pytest.raises(moeret.ConfigError, match="list of strings"):
            client.encode_query("gold")
        assert {own["name"] for own in client.experts()["experts"]} == {"base", "fruit", "metal"}


def test_the_asynchronous_client_does_too(served):
    retriever, url = served

    async def ask():
        async with AsyncClient(url) as client:
            found = await asyncio.gather(*(client.search(query, 5) for query in QUERIES))
            return found, await client.encode_query(QUERIES)

    found, vectors = asyncio.run(ask())
    for query, hits in zip(QUERIES, found, strict=True):
        same(hits, retriever.search(query, 5))
    assert vectors.dtype == np.float32 and vectors.shape == (len(QUERIES), 16)


def test_what_is_refused_is_told(served):
    _, url = served
    with Client(url) as client, pytest.raises(ServiceError, match="422: there is no route 'law'") as refused:
        client.search("gold", route="law")
    assert refused.value.status == 422

    async def ask():
        async with AsyncClient("http://127.0.0.1:1") as nobody:
            await nobody.search("gold")

    with pytest.raises(ServiceError, match="gave no answer"):
        asyncio.run(ask())
