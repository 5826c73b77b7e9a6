"""The service answers as a Retriever does, and tells askers what is wrong with what they asked."""

import base64
import contextlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from shutil import copytree

import numpy as np
import pytest
from conftest import QUERIES, write_jsonl
from starlette.testclient import TestClient

import moeret
from moeret.config import ServeConfig
from moeret.serving.app import make_app

SMALL = ServeConfig(most_bytes=2000, most_characters=100, most_hits=20, most_texts=3, reload_every=0)


@contextlib.contextmanager
def started(*arguments, **options):
    """A client of a service that has warmed up."""
    with TestClient(make_app(*arguments, **options), raise_server_exceptions=False) as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.01)
        yield client


@pytest.fixture(scope="module")
def retriever(index_folder):
    return moeret.Retriever.load(index_folder)


@pytest.fixture(scope="module")
def service(retriever):
    with started(retriever, SMALL) as client:
        yield client


def search(service, query, **options):
    answer = service.post("/search", json={"query": query, **options})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(
    "options",
    [{}, {"k": 3}, {"route": "all"}, {"route": "base"}, {"route": "fruit"}, {"fusion": "rrf"}, {"experts": 1}],
)
def test_hits_are_those_of_the_retriever(service, retriever, options):
    for query in QUERIES:
        found = search(service, query, **options)
        [expected] = retriever.search_batch([query], **{"k": 10, **options})
        names = ("rank", "id", "score", "expert", "domain", "title", "text", "metadata")
        assert [{name: hit[name] for name in names} for hit in found["hits"]] == [
            {name: getattr(hit, name) for name in names} for hit in expected
        ]


def test_queries_that_arrive_together_get_the_hits_that_each_gets_alone(service):
    alone = [[hit["id"] for hit in search(service, query)["hits"]] for query in QUERIES]
    with ThreadPoolExecutor(12) as threads:
        together = list(threads.map(lambda query: search(service, query)["hits"], QUERIES * 6))
    assert [[hit["id"] for hit in hits] for hits in together] == alone * 6
    sizes = [line for line in service.get("/metrics").text.splitlines() if line.startswith("moeret_batch_queries_")]
    total = {line.split()[0]: float(line.split()[1]) for line in sizes}
    assert total["moeret_batch_queries_sum"] > total["moeret_batch_queries_count"]


def test_a_search_says_how_it_was_routed_and_how_long_each_stage_took(service, retriever):
    found = search(service, "gold and silver")
    route = retriever.route(["gold and silver"])[0]
    assert found["route"]["experts"] == pytest.approx(route.experts, abs=1e-5)
    assert found["route"]["probabilities"] == pytest.approx(route.probabilities, abs=1e-5)
    assert [*found["milliseconds"]] == ["wait", "embed", "search", "fetch"]
    assert min(found["milliseconds"].values()) >= 0
    assert set(found["indexes"]) <= {"base", "fruit", "metal"}
    assert search(service, "gold", route="metal")["route"] is None
    answer = service.post("/route", json={"query": "gold and silver"}).json()
    assert answer == found["route"]


def test_snippets_come_on_demand_and_texts_stay_away_on_demand(service):
    plain, shown = search(service, "apple and pear"), search(service, "apple and pear", snippets=True, texts=False)
    for with_text, hit in zip(plain["hits"], shown["hits"], strict=True):
        assert with_text["snippet"] is None and hit["text"] is None
        assert hit["snippet"]["text"] in with_text["text"]
        marked = {hit["snippet"]["text"][start:end] for start, end in hit["snippet"]["words"]}
        assert marked <= {"apple", "pear"}


def test_embeddings_are_the_models(service, retriever):
    texts = QUERIES[:3]
    for expert in ("auto", "base", "fruit"):
        answer = service.post("/embed", json={"texts": texts, "expert": expert}).json()
        expected = retriever.model.encode_query(texts, expert=expert, normalize_embeddings=True)
        np.testing.assert_allclose(answer["embeddings"], expected, atol=1e-5)
    answer = service.post("/embed", json={"texts": texts, "expert": "base", "input_type": "document"}).json()
    np.testing.assert_allclose(
        answer["embeddings"],
        retriever.model.encode_document(texts, expert="base", normalize_embeddings=True),
        atol=1e-5,
    )


def test_documents_are_embedded_as_the_models_own_unless_an_expert_is_named(service, retriever, both):
    texts, body = QUERIES[:2], {"texts": QUERIES[:2], "input_type": "document"}
    expected = retriever.model.encode_document(texts, normalize_embeddings=True)
    np.testing.assert_allclose(service.post("/embed", json=body).json()["embeddings"], expected, atol=1e-5)
    with started(both, SMALL) as client:
        answer = client.post("/embed", json=body)
        assert answer.status_code == 422 and "name one, not auto" in answer.json()["detail"]
        answer = client.post("/embed", json={**body, "expert": "fruit"}).json()
        expected = both.model.encode_document(texts, expert="fruit", normalize_embeddings=True)
        np.testing.assert_allclose(answer["embeddings"], expected, atol=1e-5)


def test_many_texts_are_embedded_in_pieces_and_given_up_between_them(retriever):
    own, pieces = moeret.Retriever.load(retriever.index.root), []
    encode = own.model.encode_query
    with started(own, ServeConfig(batch_tokens=20, reload_every=0, deadline=0.5)) as client:
        own.model.encode_query = lambda texts, **how: pieces.append(texts) or encode(texts, **how)
        texts = [f"gold and silver {number}" for number in range(30)]
        answer = client.post("/embed", json={"texts": texts, "expert": "metal"})
        np.testing.assert_allclose(
            answer.json()["embeddings"], encode(texts, expert="metal", normalize_embeddings=True), atol=1e-5
        )
        assert [text for piece in pieces for text in piece] == texts and len(pieces) > 5
        pieces.clear()
        own.model.encode_query = lambda texts, **how: time.sleep(0.2) or pieces.append(texts) or encode(texts, **how)
        assert client.post("/embed", json={"texts": texts, "expert": "metal"}).status_code == 504
        time.sleep(0.5)
        assert len(pieces) < 5  # nobody waits for the rest


def test_openais_embeddings_in_both_formats(service, retriever):
    body = {"input": QUERIES[:2], "model": "metal"}
    floats = service.post("/v1/embeddings", json=body).json()
    packed = service.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()
    expected = retriever.model.encode_query(QUERIES[:2], expert="metal", normalize_embeddings=True)
    np.testing.assert_allclose([own["embedding"] for own in floats["data"]], expected, atol=1e-5)
    unpacked = [np.frombuffer(base64.b64decode(own["embedding"]), "<f4") for own in packed["data"]]
    np.testing.assert_allclose(unpacked, expected, atol=1e-5)
    assert floats["usage"]["prompt_tokens"] == sum(map(len, retriever.model.base.tokenizer(QUERIES[:2])))
    single = service.post("/v1/embeddings", json={"input": QUERIES[0], "model": "metal"}).json()
    assert single["data"][0]["index"] == 0 and len(single["data"]) == 1
    names = [own["id"] for own in service.get("/v1/models").json()["data"]]
    assert names[:2] == ["auto", "base"] and {"fruit", "metal"} <= {*names}


def test_the_experts_are_told(service, retriever):
    about = service.get("/experts").json()
    assert {own["name"]: own["documents"] for own in about["experts"] if own["documents"]} == retriever.sizes
    assert (about["width"], about["tower"]) == (16, "query")
    assert about["documents"] == sum(retriever.sizes.values()) == 24


def test_a_document_in_two_indexes_counts_once(tmp_path, model_folder, domains):
    corpora = [domains["fruit"] / "corpus.jsonl"]
    moeret.build_index(model_folder, tmp_path / "index", {"fruit": domains["fruit"]}, corpora)
    with started(moeret.Retriever.load(tmp_path / "index"), SMALL) as service:
        about = service.get("/experts").json()
    assert about["documents"] == 12 < sum(own["documents"] for own in about["experts"])


@pytest.mark.parametrize(("path", "body", "told"), [
    ("/search", {}, "query"),
    ("/search", {"query": "  "}, "must have some text"),
    ("/search", {"query": "x" * 101}, "at most 100 characters"),
    ("/search", {"query": "\ud800"}, "surrogate"),
    ("/search", {"query": "x", "k": 0}, "greater than or equal to 1"),
    ("/search", {"query": "x", "k": 21}, "at most 20"),
    ("/search", {"query": "x", "k": "3"}, "valid integer"),
    ("/search", {"query": "x", "kk": 3}, "kk"),
    ("/search", {"query": "x", "route": "law"}, "there is no route"),
    ("/search", {"query": "x", "route": "\ud800"}, "surrogate"),
    ("/search", {"query": "x", "experts": 0}, "experts"),
    ("/search", {"query": "x", "fusion": "sum"}, "fusion"),
    ("/search", {"query": "x", "where": {"year": {"above": 3}}}, "above"),
    ("/search", {"query": "x", "where": {"year": {"in": [*range(40)]}}}, "filter may have at most 100 characters"),
    ("/search", [], "body"),
    ("/embed", {"texts": []}, "texts"),
    ("/embed", {"texts": ["a"] * 4}, "at most 3 texts"),
    ("/embed", {"texts": ["a"], "expert": "law"}, "law"),
    ("/v1/embeddings", {"input": [1, 2]}, "body.input.0: Input should be a valid string"),
    ("/v1/embeddings", {"input": "a", "dimensions": 3}, "dimensions must be 16"),
    ("/v1/embeddings", {"input": "a", "model": "text-embedding-3-small"}, "text-embedding-3-small"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_and_said(service, path, body, told):
    answer = service.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert told in answer.json()["detail"]
    assert "[" not in answer.json()["detail"].partition(": ")[0]  # no name of a type of our code


@pytest.mark.parametrize("body", [
    b"", b"{", b"\xff\xfe", b'{"query": "x", "k": 1e999}', b'{"query": NaN}', b"[" * 1900,
    b'{"query": "x", "k": ' + b"9" * 1900 + b"}",
])  # fmt: skip
def test_bodies_that_are_no_json_are_refused(service, body):
    answer = service.post("/search", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422) and answer.json()["detail"]


def test_json_that_is_not_said_to_be_is_told_how(service):
    kind = {"content-type": "application/x-www-form-urlencoded"}  # as curl has it unless told
    answer = service.post("/search", content=b'{"query": "x"}', headers=kind)
    assert answer.status_code == 422 and "header Content-Type: application/json" in answer.json()["detail"]
    assert "Content-Type" not in service.post("/search", json={}).json()["detail"]


def test_many_experts_are_as_many_as_there_are(service):
    assert search(service, "gold and silver", experts=10**9)["hits"]


def test_large_bodies_are_refused(service):
    for headers in ({}, {"content-length": "999999999"}):
        answer = service.post("/search", content=b" " * 2001, headers=headers)
        assert answer.status_code == 413 and "2000 bytes" in answer.json()["detail"]


def test_a_fault_inside_is_told_without_its_trace(retriever, caplog):
    broken = moeret.Retriever.load(retriever.index.root)
    with started(broken, SMALL) as client:
        broken.rank = None
        answer = client.post("/search", json={"query": "gold"})
        assert answer.status_code == 500
        assert answer.json() == {"detail": "an error inside the service; its log says which"}
        assert "TypeError" in caplog.text
        assert 'moeret_requests_total{path="/search",status="500"} 1.0' in client.get("/metrics").text


def test_who_asks_too_much_is_told_to_come_again(retriever):
    slow, begun, go_on = moeret.Retriever.load(retriever.index.root), threading.Event(), threading.Event()
    config = ServeConfig(most_waiting=2, wait=0, reload_every=0)
    with started(slow, config) as client, ThreadPoolExecutor(8) as threads:
        found = slow.rank
        slow.rank = lambda *own, **how: begun.set() or (go_on.wait(20) and found(*own, **how))
        answers = [threads.submit(client.post, "/search", json={"query": "gold"})]
        assert begun.wait(20)  # it is being answered, and waits no more
        answers += [threads.submit(client.post, "/search", json={"query": f"gold {number}"}) for number in range(7)]
        while sum(own.done() for own in answers) < 5:
            go_on.wait(0.01)
        go_on.set()
        statuses = sorted(own.result().status_code for own in answers)
        refused = [own.result() for own in answers if own.result().status_code == 429]
    assert statuses == [200] * 3 + [429] * 5
    assert all(own.headers["retry-after"] == "1" for own in refused)


def test_what_takes_too_long_is_given_up(retriever):
    slow, go_on = moeret.Retriever.load(retriever.index.root), threading.Event()
    with started(slow, ServeConfig(deadline=0.2, reload_every=0)) as client:
        slow.rank = lambda *own, **how: go_on.wait(20)
        answer = client.post("/search", json={"query": "gold"})
        go_on.set()
    assert answer.status_code == 504 and "0.2 seconds" in answer.json()["detail"]


def test_a_key_is_asked_for_where_there_is_one(retriever):
    with started(retriever, SMALL, key="s3cret") as client:
        for headers in (
            {},
            {"authorization": "Bearer other"},
            {"authorization": "s3cret"},
            {"authorization": "Bearer "},
        ):
            for path in ("/search", "/metrics", "/experts", "/v1/models", "/page", "/nothing"):
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", path
        for path in ("/", "/page/page.js", "/health", "/ready", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200, path
        headers = {"authorization": "bearer s3cret"}
        assert client.post("/search", json={"query": "gold"}, headers=headers).status_code == 200
    for key in ("", "två", " x", "a\nb"):
        with pytest.raises(moeret.ConfigError, match="printable ASCII"):
            make_app(retriever, key=key)


def test_it_is_ready_from_warm_to_closing(retriever):
    client = TestClient(make_app(retriever, SMALL))
    assert (client.get("/health").status_code, client.get("/ready").status_code) == (200, 503)
    with client:
        assert client.get("/health").status_code == 200  # also while it warms up
        while client.get("/ready").status_code == 503:
            time.sleep(0.01)
        assert client.get("/ready").json() == {"status": "ready"}
        assert [client.head(path).status_code for path in ("/ready", "/health")] == [200, 200]
    assert client.get("/ready").status_code == 503
    assert client.post("/search", json={"query": "gold"}).status_code == 503


def test_a_new_snapshot_is_searched_without_a_dropped_query(index_folder, tmp_path):
    index = copytree(index_folder, tmp_path / "index")
    write_jsonl(tmp_path / "new.jsonl", [{"_id": "new", "text": "gold and silver and tin and zinc"}])
    with started(moeret.Retriever.load(index), ServeConfig(reload_every=0.05)) as client:
        stop, answers = threading.Event(), []

        def ask():
            while not stop.is_set():
                answers.append(client.post("/search", json={"query": "gold and silver", "k": 50, "route": "all"}))

        asker = threading.Thread(target=ask)
        asker.start()
        moeret.update_index(index, corpora=[tmp_path / "new.jsonl"])
        while not (answers and answers[-1].json()["snapshot"] == 2):
            stop.wait(0.01)
        stop.set()
        asker.join()
        assert {answer.status_code for answer in answers} == {200}
        for answer in answers:
            ids = {hit["id"] for hit in answer.json()["hits"]}
            assert ("new" in ids) == (answer.json()["snapshot"] == 2)
        assert "moeret_snapshot 2.0" in client.get("/metrics").text


def test_the_page_and_the_openapi_page_ask_no_other_host(service):
    for path in ("/", "/page/page.js", "/page/page.css", "/docs"):
        answer = service.get(path)
        assert answer.status_code == 200
        assert "http://" not in answer.text.replace("http://www.w3.org", "") and "https://" not in answer.text, path
    assert "default-src 'self'" in service.get("/").headers["content-security-policy"]
    paths = service.get("/openapi.json").json()["paths"]
    assert {"/search", "/route", "/embed", "/v1/embeddings", "/experts", "/health", "/ready", "/metrics"} <= {*paths}


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/search", 405), ("POST", "/serach", 404), ("DELETE", "/health", 405), ("POST", "/", 405),
])  # fmt: skip
def test_methods_and_paths_that_are_not_there(service, method, path, status):
    assert service.request(method, path).status_code == status


@pytest.mark.parametrize("path", [
    "/../app.py", "/page/../../app.py", "/%2e%2e/app.py", "/page/%2e%2e%2f%2e%2e%2fapp.py", "/nothing", "//etc/passwd",
])  # fmt: skip
def test_paths_lead_nowhere_else(service, path):
    answer = service.get(path)
    assert answer.status_code == 404 and answer.json() == {"detail": "Not Found"}
