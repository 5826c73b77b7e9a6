"""The indexing job: what goes where, what is refused, and what a job that dies leaves behind."""

import errno
import json
import resource
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import QUERIES, place_by_router, write_domain, write_jsonl
from safetensors import SafetensorError

import moeret
from moeret import artifact
from moeret.config import IndexConfig
from moeret.data.beir import read_corpus
from moeret.lock import writing
from moeret.models.memory import Blend
from moeret.models.model import Model
from moeret.retrieval import build, segment, shards
from moeret.retrieval.build import build_index
from moeret.retrieval.job import Job
from moeret.types import Document

GRAPHS = IndexConfig(exact_below=0)


@pytest.fixture(scope="module")
def trained(model_folder) -> Model:
    return Model.load(model_folder)


@pytest.fixture
def index(tmp_path, index_folder) -> Path:
    """A copy of the shared index, to be changed."""
    shutil.copytree(index_folder, tmp_path / "index")
    return tmp_path / "index"


def held(index: Path) -> dict[str, set[Document]]:
    """Expert -> the documents in its index."""
    retriever = moeret.Retriever.load(index)
    rows = retriever.held()
    retriever.close()
    return {name: {document for expert, document in rows if expert == name} for name in retriever.sizes}


def loose_corpus(path: Path, *, ids: str = "loose") -> list[dict]:
    texts = ["a story of the fruit apple", "iron and the metal zinc", "the rhine", "copper tin gold", "kiwi and plum"]
    rows = [{"_id": f"{ids}{number}", "title": "", "text": text} for number, text in enumerate(texts)]
    write_jsonl(path, rows)
    return rows


def assert_nothing_unfinished(folder: Path) -> None:
    assert [path for path in folder.rglob("*") if path.name.endswith(".unfinished")] == []


def test_each_domain_goes_to_its_expert(index_folder, two_domains):
    expected = {name: set(read_corpus(path / "corpus.jsonl")) for name, path in two_domains.items()}
    assert held(index_folder) == expected
    meta = artifact.read(index_folder, "index").meta
    assert meta["documents"]["count"] == 24
    assert {name: expert["documents"] for name, expert in meta["experts"].items()} == {"fruit": 12, "metal": 12}


def test_a_finished_index_keeps_no_work_files(index_folder):
    names = {path.relative_to(index_folder).as_posix() for path in index_folder.rglob("*") if path.is_file()}
    assert names == {*artifact.read(index_folder, "index").files, "manifest.json", ".lock"}


def test_vectors_are_the_documents_base_embeddings_by_row(index_folder, trained):
    retriever = moeret.Retriever.load(index_folder)
    contents = [document.contents for _, document in retriever.held()]
    vectors = trained.encode_document(contents, normalize_embeddings=True)
    np.testing.assert_allclose(retriever.vectors(), vectors, atol=1e-5)
    retriever.close()


def test_loose_documents_go_to_the_base_and_the_familiar_ones_to_their_expert_too(
    tmp_path, monkeypatch, model_folder, two_domains, trained
):
    rows = loose_corpus(tmp_path / "loose.jsonl")
    vectors = trained.encode_document([row["text"] for row in rows], normalize_embeddings=True)
    best = trained.document_router.probabilities(vectors).argmax(axis=1)
    documents = [Document(row["_id"], row["text"]) for row in rows]
    for name, limit in (("familiar", -1.0), ("unfamiliar", 1.1)):
        place_by_router(monkeypatch, limit)
        published = build_index(model_folder, tmp_path / name, two_domains, [tmp_path / "loose.jsonl"])
        got = held(tmp_path / name)
        assert got["base"] == {*documents}
        for number, expert in enumerate(trained.experts):
            own = {document for document, home in zip(documents, best, strict=True) if home == number}
            assert got[expert] & got["base"] == (own if name == "familiar" else set())
        assert published.meta["documents"]["count"] == 24 + len(rows)


def test_a_document_of_two_indexes_is_one_hit(tmp_path, monkeypatch, model_folder, two_domains):
    place_by_router(monkeypatch, -1.0)
    loose_corpus(tmp_path / "loose.jsonl")
    build_index(model_folder, tmp_path / "index", two_domains, [tmp_path / "loose.jsonl"])
    hits = moeret.Retriever.load(tmp_path / "index").search("find the rhine", k=50, route="all")
    assert len({(hit.id, hit.text) for hit in hits}) == len(hits) == 29


@pytest.fixture
def with_rivers(tmp_path, monkeypatch, model_folder, two_domains):
    """Two domains and documents of another, which no router has seen, and these documents' texts; only vectors count."""
    place_by_router(monkeypatch, 1.1)
    rows = loose_corpus(tmp_path / "loose.jsonl")
    build_index(model_folder, tmp_path / "index", two_domains, [tmp_path / "loose.jsonl"])
    retriever = moeret.Retriever.load(tmp_path / "index")
    retriever.blends = {}
    yield retriever, [row["text"] for row in rows]
    retriever.close()


def test_a_query_whose_best_hit_has_no_domain_is_searched_again_as_the_base_would(with_rivers):
    retriever, rivers = with_rivers
    retriever.strange_limit = -np.inf  # every query searches the base's own index too
    queries = [*rivers, "find the metal nick10", "which fruit is nick11"]
    found = retriever.rank(queries, 5)
    assert 0 < sum(route.abstained for route in found.routes) < len(queries)
    assert found.routes == retriever.route(queries)
    as_base = retriever.search_batch(queries, 50, route="base")
    for own, base, route, indexes in zip(retriever.hits(found), as_base, found.routes, found.indexes, strict=True):
        if route.abstained:
            assert not route.experts and "base" in indexes
            assert [hit.id for hit in own] == [hit.id for hit in base if hit.expert in indexes][:5]
        else:
            assert own[0].expert != "base" and route.experts


def test_a_memory_does_not_tell_whose_a_query_is(with_rivers):
    retriever, rivers = with_rivers
    retriever.strange_limit = -np.inf
    without = retriever.route(rivers)
    retriever.blends = {name: Blend(0.0, 50.0) for name in retriever.model.experts}
    assert any(own.abstained for own in without)
    assert [own.abstained for own in retriever.route(rivers)] == [own.abstained for own in without]


def test_the_lower_the_limit_the_more_queries_search_the_base_s_own_index(with_rivers):
    retriever, rivers = with_rivers
    known = [f"find the {name} nick{number}" for name in ("fruit", "metal") for number in range(12)]
    dev, before = retriever.strange_limit, np.zeros(len(rivers) + len(known), bool)
    for retriever.strange_limit in (np.inf, dev + 1, dev, dev - 1, dev - 2, -np.inf):
        found = retriever.rank([*rivers, *known], 1)
        strange = np.array(["base" in indexes for indexes in found.indexes])
        assert (before <= strange).all()
        assert not any(route.abstained for route, own in zip(found.routes, strange, strict=True) if not own)
        before = strange
    assert strange.all()


def test_an_index_of_loose_documents_alone(tmp_path, monkeypatch, model_folder):
    place_by_router(monkeypatch, 1.1)
    loose_corpus(tmp_path / "loose.jsonl")
    published = build_index(model_folder, tmp_path / "index", {}, [tmp_path / "loose.jsonl"])
    assert list(published.meta["experts"]) == ["base"]
    hits = moeret.Retriever.load(tmp_path / "index").search("the rhine", k=50)
    assert sorted(hit.id for hit in hits) == [f"loose{number}" for number in range(5)]


def test_a_loose_document_may_have_an_id_of_a_domain_s_and_hits_tell_which_is_which(
    tmp_path, monkeypatch, model_folder, two_domains
):
    place_by_router(monkeypatch, -1.0)
    write_jsonl(tmp_path / "loose.jsonl", [{"_id": "d3", "title": "", "text": "apple pear"}])
    build_index(model_folder, tmp_path / "index", two_domains, [tmp_path / "loose.jsonl"])
    hits = moeret.Retriever.load(tmp_path / "index").search("find the apple", k=50, route="all")
    named = sorted((hit.domain, hit.title) for hit in hits if hit.id == "d3")
    assert named == [("", ""), ("fruit", "fig"), ("metal", "gold")]


def test_one_id_in_two_corpora_is_refused(tmp_path, monkeypatch, model_folder):
    place_by_router(monkeypatch, 1.1)
    monkeypatch.setattr("moeret.models.embed.Embedder.base", lambda *rest, **more: pytest.fail("embedded first"))
    loose_corpus(tmp_path / "one.jsonl")
    write_jsonl(tmp_path / "two.jsonl", [{"_id": "loose0", "text": "another"}])
    with pytest.raises(
        moeret.DataError, match=r"two\.jsonl: line 1: id 'loose0' is another document's on line 1 of .*one"
    ):
        build_index(model_folder, tmp_path / "index", {}, [tmp_path / "one.jsonl", tmp_path / "two.jsonl"])


def test_the_same_document_in_two_corpora_is_one_hit(tmp_path, monkeypatch, model_folder):
    place_by_router(monkeypatch, 1.1)
    for name in ("one.jsonl", "two.jsonl"):
        loose_corpus(tmp_path / name)
    published = build_index(
        str(model_folder), str(tmp_path / "i"), {}, [str(tmp_path / "one.jsonl"), tmp_path / "two.jsonl"]
    )
    assert published.meta["documents"]["count"] == 5
    hits = moeret.Retriever.load(tmp_path / "i").search("the rhine", k=50)
    assert sorted(hit.id for hit in hits) == [f"loose{number}" for number in range(5)]


def test_a_model_may_change_while_its_documents_are_embedded(tmp_path, monkeypatch, model_folder, two_domains):
    before = build_index(model_folder, tmp_path / "before", two_domains)
    model = shutil.copytree(model_folder, tmp_path / "model")
    usual, one = shards.kept_vectors, threading.Lock()

    def removing(*rest):
        with one:  # shards are encoded side by side
            if "metal" in moeret.Model.load(model).experts:
                moeret.remove_expert(model, "metal")
        return usual(*rest)

    monkeypatch.setattr(shards, "kept_vectors", removing)
    assert build_index(model, tmp_path / "index", two_domains).fingerprint == before.fingerprint


def test_a_model_that_changes_before_it_is_copied_is_said_so(tmp_path, monkeypatch, model_folder, two_domains):
    model = shutil.copytree(model_folder, tmp_path / "model")

    usual = build.scan

    def removing(*rest):
        if "metal" in moeret.Model.load(model).experts:
            moeret.remove_expert(model, "metal")
        return usual(*rest)

    monkeypatch.setattr(build, "scan", removing)
    with pytest.raises(moeret.ArtifactError, match="was changed meanwhile; index it again"):
        build_index(model, tmp_path / "index", {"fruit": two_domains["fruit"]})
    build_index(model, tmp_path / "index", {"fruit": two_domains["fruit"]})


def test_what_a_killed_job_left_of_a_shard_is_no_hindrance(tmp_path, monkeypatch, model_folder, two_domains):
    with monkeypatch.context() as patched:
        patched.setattr(segment, "write_documents", lambda path, documents: raise_(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_index(model_folder, tmp_path / "index", two_domains)
    for left in ("documents.sqlite.unfinished", "table-0123456789ab.safetensors", "vectors.hnsw"):
        (tmp_path / "index" / "building" / "shards" / "000000" / "fruit" / left).write_bytes(b"half")
    build_index(model_folder, tmp_path / "index", two_domains)
    assert set.union(*held(tmp_path / "index").values()) == set.union(
        *(set(read_corpus(path / "corpus.jsonl")) for path in two_domains.values())
    )


@pytest.mark.parametrize("shard_documents", [1, 5, 12, 100])
@pytest.mark.parametrize("segment_documents", [5, 1000])
def test_the_index_holds_the_same_however_it_is_cut(
    tmp_path, monkeypatch, model_folder, two_domains, index_folder, shard_documents, segment_documents
):
    place_by_router(monkeypatch, 0.5)
    loose_corpus(tmp_path / "loose.jsonl")
    for name, config in (
        ("whole", IndexConfig()),
        ("cut", IndexConfig(shard_documents=shard_documents, segment_documents=segment_documents)),
    ):
        build_index(model_folder, tmp_path / name, two_domains, [tmp_path / "loose.jsonl"], config=config)
    whole, cut = (moeret.Retriever.load(tmp_path / name) for name in ("whole", "cut"))
    for route in ("auto", "all", "base", "fruit"):
        for one, other in zip(
            whole.search_batch(QUERIES, 20, route=route), cut.search_batch(QUERIES, 20, route=route), strict=True
        ):
            assert {(own.expert, own.domain, own.id) for own in one} == {
                (own.expert, own.domain, own.id) for own in other
            }
            np.testing.assert_allclose([own.score for own in one], [own.score for own in other], atol=1e-5)


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_shard_that_was_damaged_since_is_encoded_again(tmp_path, monkeypatch, model_folder, two_domains, damage):
    undisturbed = build_index(model_folder, tmp_path / "undisturbed", two_domains)
    with monkeypatch.context() as patched:
        patched.setattr(Job, "link", lambda *rest: raise_(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_index(model_folder, tmp_path / "index", two_domains)
    for file in (tmp_path / "index" / "building" / "shards").rglob("documents-*.sqlite"):
        raw = file.read_bytes()
        file.write_bytes(raw[:-1] if damage == "cut" else bytes([raw[0] ^ 1]) + raw[1:])
        if damage == "gone":
            file.unlink()
    assert build_index(model_folder, tmp_path / "index", two_domains).fingerprint == undisturbed.fingerprint


def test_an_unfinished_job_goes_on_for_the_same_request_only(tmp_path, monkeypatch, model_folder, two_domains):
    with monkeypatch.context() as patched:
        patched.setattr(Job, "link", lambda *rest: raise_(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_index(model_folder, tmp_path / "index", two_domains)
    with pytest.raises(
        moeret.ConfigError, match=r"unfinished job for other things \(ef 200 -> 50\).*delete .*building"
    ):
        build_index(model_folder, tmp_path / "index", two_domains, config=IndexConfig(ef=50))
    other = build_index(model_folder, tmp_path / "index", two_domains, config=IndexConfig(ef=50), overwrite=True)
    assert other.meta["config"]["ef"] == 50


def test_documents_that_cannot_be_used_are_left_out_and_listed_if_asked(tmp_path, model_folder):
    path = tmp_path / "loose.jsonl"
    loose_corpus(path)
    path.write_text('{"_id": 1}\n' + path.read_text() + "no json\n")
    with pytest.raises(moeret.DataError, match=r"loose\.jsonl: line 1: there is no text; it has _id; line 7: not JSON"):
        build_index(model_folder, tmp_path / "index", {}, [path])
    assert not (tmp_path / "index").exists()
    published = build_index(model_folder, tmp_path / "index", {}, [path], on_error="skip")
    assert published.meta["documents"]["count"] == 5
    listed = [json.loads(line) for line in (tmp_path / "index" / "skipped.jsonl").read_text().splitlines()]
    assert [(own["file"], own["line"]) for own in listed] == [(str(path), 1), (str(path), 7)]
    assert listed[0]["reason"] == "there is no text; it has _id"
    loose_corpus(path)
    build_index(model_folder, tmp_path / "index", {}, [path], overwrite=True)
    assert not (tmp_path / "index" / "skipped.jsonl").exists()


def test_a_domain_without_an_expert_is_refused_with_the_command_that_helps(tmp_path, model_folder, domains):
    with pytest.raises(moeret.ConfigError, match=r"no expert river \(it has fruit, metal\).*moeret experts add"):
        build_index(model_folder, tmp_path / "index", domains)


def test_nothing_to_index_is_refused(tmp_path, model_folder):
    with pytest.raises(moeret.ConfigError, match="nothing to index"):
        build_index(model_folder, tmp_path / "index", {})


def test_a_missing_corpus_is_refused_by_name(tmp_path, model_folder):
    with pytest.raises(moeret.DataError, match=r"nowhere\.jsonl is not there"):
        build_index(model_folder, tmp_path / "index", {}, [tmp_path / "nowhere.jsonl"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(moeret.DataError, match=r"empty/corpus\.jsonl is not there"):
        build_index(model_folder, tmp_path / "index", {"fruit": tmp_path / "empty"})


def test_the_same_request_again_returns_the_index_without_building(monkeypatch, index, model_folder, two_domains):
    before = {path: path.stat().st_mtime_ns for path in index.rglob("*") if path.name != ".lock" and path.is_file()}
    monkeypatch.setattr(segment, "write_documents", lambda path, documents: pytest.fail("built again"))
    again = build_index(model_folder, index, two_domains)
    assert again.fingerprint == artifact.read(index, "index").fingerprint
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_another_request_is_refused_and_says_what_differs(index, model_folder, two_domains, domains):
    before = artifact.read(index, "index").fingerprint
    with pytest.raises(moeret.ConfigError, match=r"made from other things \(ef 200 -> 50\).*--overwrite"):
        build_index(model_folder, index, two_domains, config=IndexConfig(ef=50))
    with pytest.raises(moeret.ConfigError, match="domain metal"):
        build_index(model_folder, index, {"fruit": domains["fruit"]})
    assert artifact.read(index, "index").fingerprint == before


def test_overwrite_replaces_an_index_and_removes_the_old_files(index, model_folder, two_domains):
    old = artifact.read(index, "index")
    new = build_index(model_folder, index, {"fruit": two_domains["fruit"]}, config=GRAPHS, overwrite=True)
    assert list(held(index)) == ["fruit"]
    gone = old.files.keys() - new.files.keys()
    assert gone
    assert not [name for name in gone if (index / name).exists()]


def test_overwrite_replaces_a_damaged_index(index, model_folder, two_domains):
    published = artifact.read(index, "index")
    next(index.rglob("documents-*.sqlite")).unlink()
    with pytest.raises(moeret.ArtifactError, match="is missing"):
        build_index(model_folder, index, two_domains)
    build_index(model_folder, index, two_domains, overwrite=True)
    assert artifact.read(index, "index").fingerprint == published.fingerprint
    (index / "manifest.json").write_text("{")
    build_index(model_folder, index, two_domains, overwrite=True)
    assert artifact.read(index, "index").fingerprint == published.fingerprint


def test_a_model_is_never_overwritten_by_an_index(tmp_path, model_folder, two_domains):
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    before = artifact.read(model, "model").fingerprint
    for overwrite in (False, True):
        with pytest.raises(moeret.ArtifactError, match="expected a"):
            build_index(model, model, two_domains, overwrite=overwrite)
    assert artifact.read(model, "model").fingerprint == before
    assert Model.load(model).experts == ("fruit", "metal")
    assert (model / "training").is_dir()


def test_a_folder_that_someone_else_uses_keeps_what_was_in_it(tmp_path, model_folder, two_domains):
    kept = [tmp_path / name for name in ("report.txt", "training/notes.txt", "building/notes.txt", "segments/mine.txt")]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    build_index(model_folder, tmp_path, two_domains)
    assert [path.read_text() for path in kept] == ["mine"] * 4
    assert list((tmp_path / "building").iterdir()) == [tmp_path / "building" / "notes.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_job_that_dies_publishes_nothing_and_the_next_one_makes_the_same_index(
    tmp_path, monkeypatch, model_folder, two_domains, error
):
    undisturbed = build_index(model_folder, tmp_path / "undisturbed", two_domains, config=GRAPHS)
    with monkeypatch.context() as patched:
        patched.setattr(segment, "write_documents", lambda path, documents: (path.write_bytes(b"half"), raise_(error)))
        with pytest.raises(error):
            build_index(model_folder, tmp_path / "index", two_domains, config=GRAPHS)
    assert not artifact.exists(tmp_path / "index")
    with pytest.raises(moeret.ArtifactError, match="holds no finished index"):
        moeret.Retriever.load(tmp_path / "index")
    again = build_index(model_folder, tmp_path / "index", two_domains, config=GRAPHS)
    assert again.fingerprint == undisturbed.fingerprint
    assert (tmp_path / "index" / "manifest.json").read_bytes() == (
        tmp_path / "undisturbed" / "manifest.json"
    ).read_bytes()
    files = {path.relative_to(tmp_path / "index").as_posix() for path in (tmp_path / "index").rglob("*")}
    assert files == {
        path.relative_to(tmp_path / "undisturbed").as_posix() for path in (tmp_path / "undisturbed").rglob("*")
    }


def raise_(error):
    raise error


def test_vectors_made_before_a_job_died_are_not_made_again(tmp_path, monkeypatch, model_folder):
    folder = write_domain(tmp_path / "fruit", "river")  # documents that training has not seen
    monkeypatch.setattr(Job, "link", lambda *rest: raise_(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build_index(model_folder, tmp_path / "index", {"fruit": folder})
    monkeypatch.undo()
    monkeypatch.setattr("moeret.models.embed.Embedder.base", lambda *rest, **more: pytest.fail("embedded again"))
    build_index(model_folder, tmp_path / "index", {"fruit": folder})
    assert not (tmp_path / "index" / "building").exists()


@pytest.mark.parametrize("place", ["write_documents", "save_file"])
def test_a_full_disk_leaves_the_old_index_in_use(monkeypatch, index, model_folder, two_domains, place):
    before = artifact.read(index, "index").fingerprint
    with monkeypatch.context() as patched:
        patched.setattr(segment, place, lambda *rest: raise_(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            build_index(model_folder, index, two_domains, config=GRAPHS, overwrite=True)
    assert_nothing_unfinished(index)
    assert artifact.read(index, "index").fingerprint == before
    assert len(moeret.Retriever.load(index).search("find the metal nick10", k=50)) >= 12
    build_index(model_folder, index, two_domains, config=GRAPHS, overwrite=True)
    assert artifact.read(index, "index").fingerprint != before


@pytest.mark.parametrize("most", [500, 1500, 4096, 6000])
def test_writes_that_really_fail_leave_the_old_index_in_use(index, model_folder, two_domains, most):
    """The operating system refuses bytes beyond `most` in a file, whichever writer comes to them first."""
    before = artifact.read(index, "index").fingerprint
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limit[1]))
    try:
        with pytest.raises((OSError, SafetensorError)):
            build_index(model_folder, index, two_domains, config=GRAPHS, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert_nothing_unfinished(index)
    assert artifact.read(index, "index").fingerprint == before


def test_two_jobs_in_one_directory_are_refused(tmp_path, model_folder, two_domains):
    with writing(tmp_path / "index"), pytest.raises(moeret.BusyError, match="another process is writing"):
        build_index(model_folder, tmp_path / "index", two_domains)


def test_graphs_are_reported_with_their_recall(tmp_path, model_folder, two_domains):
    published = build_index(model_folder, tmp_path / "index", two_domains, config=GRAPHS)
    for expert in published.meta["experts"].values():
        [own] = expert["segments"]
        assert own["recall@10"] == 1.0
        assert own["documents"] == 12


def test_an_index_holds_its_model_and_works_without_the_original(tmp_path, model_folder, two_domains):
    shutil.copytree(model_folder, tmp_path / "model")
    build_index(tmp_path / "model", tmp_path / "index", two_domains)
    shutil.rmtree(tmp_path / "model")
    assert moeret.Retriever.load(tmp_path / "index").search("find the metal nick10")


def test_the_order_in_which_domains_are_given_does_not_matter(tmp_path, model_folder, two_domains):
    first = build_index(model_folder, tmp_path / "one", two_domains)
    second = build_index(model_folder, tmp_path / "two", dict(reversed(two_domains.items())))
    assert first.fingerprint == second.fingerprint


def test_documents_may_be_embedded_in_bfloat16(model_folder, two_domains, index_folder, tmp_path):
    build_index(model_folder, tmp_path / "index", two_domains, config=IndexConfig(precision="bfloat16"))
    one, other = moeret.Retriever.load(index_folder), moeret.Retriever.load(tmp_path / "index", precision="bfloat16")
    cosines = (one.vectors() * other.vectors()).sum(axis=1)
    assert cosines.min() > 0.999 and not np.array_equal(one.vectors(), other.vectors())  # training's are not taken
    query = "find the apple"
    exact, rounded = (own.model.encode_query([query], expert="fruit")[0] for own in (one, other))
    assert 0 < np.abs(exact - rounded).max() < 0.1
    assert other.search(query)[0].expert == one.search(query)[0].expert
    for own in (one, other):
        own.close()


def test_an_unknown_engine_is_refused(model_folder, two_domains, tmp_path):
    with pytest.raises(moeret.ConfigError, match="local or ray, not 'Ray'"):
        build_index(model_folder, tmp_path / "index", two_domains, engine="Ray")


def test_there_are_two_precisions(model_folder, index_folder):
    for attempt in (
        lambda: IndexConfig(precision="float16"),
        lambda: moeret.Retriever.load(index_folder, precision="float16"),
        lambda: Model.load(model_folder).in_precision("double"),
    ):
        with pytest.raises(moeret.ConfigError, match="precision must be float32 or bfloat16"):
            attempt()
