"""What is exported is what the index holds, and others read it."""

import json
import shutil
from pathlib import Path

import hnswlib
import numpy as np
import pytest
from conftest import QUERIES, write_jsonl
from pyarrow import parquet

import moeret


@pytest.fixture(scope="module")
def index(tmp_path_factory, index_folder):
    """Two domains and loose documents, of which some were deleted, changed, and are copies."""
    root = tmp_path_factory.mktemp("export")
    shutil.copytree(index_folder, root / "index")
    rows = [{"_id": f"l{n}", "text": "the rhine", "metadata": {"year": 2020 + n}} for n in range(3)]
    write_jsonl(root / "l.jsonl", rows)
    write_jsonl(root / "fruit" / "corpus.jsonl", [{"_id": "d1", "text": "changed"}])
    moeret.update_index(root / "index", {"fruit": root / "fruit"}, [root / "l.jsonl"], {"metal": ["d0", "d1"]})
    return root / "index"


@pytest.fixture(scope="module")
def retriever(index):
    loaded = moeret.Retriever.load(index)
    yield loaded
    loaded.close()


def test_parquet_has_every_live_document_with_its_vector(tmp_path, index, retriever):
    table = moeret.export_index(index, tmp_path / "out")
    assert table == json.loads((tmp_path / "out" / "routing.json").read_text())
    assert table["model"]["experts"] == ["fruit", "metal"] and table["dimension"] == 16
    vectors, held = retriever.vectors(), retriever.held()
    for own in table["experts"]:
        rows = [row for row, (expert, _) in enumerate(held) if expert == own["name"]]
        read = parquet.read_table(tmp_path / "out" / own["file"]).to_pylist()
        assert len(read) == own["documents"] == len(rows)
        for row, found in zip(rows, read, strict=True):
            document = held[row][1]
            assert (found["id"], found["title"], found["text"]) == (document.id, document.title, document.text)
            assert json.loads(found["metadata"]) == json.loads(document.metadata or "{}")
            assert found["domain"] == ("" if document.id.startswith("l") else own["name"])
            np.testing.assert_array_equal(np.array(found["vector"], np.float32), vectors[row])


def test_a_plain_hnswlib_finds_what_the_retriever_finds(tmp_path, index, retriever):
    table = moeret.export_index(index, tmp_path / "out", "hnswlib")
    query = retriever.model.encode_query(["find the apple"], expert="base")
    for own in table["experts"]:
        graph = hnswlib.Index(space="ip", dim=table["dimension"])
        graph.load_index(str(tmp_path / "out" / own["file"]))
        labels = [json.loads(line)["documents"] for line in (tmp_path / "out" / own["labels"]).read_text().splitlines()]
        assert sum(map(len, labels)) == own["documents"] and graph.get_current_count() == len(labels)
        found, distances = graph.knn_query(query, k=len(labels))
        scores = [1 - d for label, d in zip(found[0], distances[0], strict=True) for _ in labels[label]]
        expected = sorted(retriever.vectors()[[name == own["name"] for name, _ in retriever.held()]] @ query[0])[::-1]
        np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_an_export_replaces_nothing_and_leaves_nothing_half_done(tmp_path, monkeypatch, index):
    (tmp_path / "out").mkdir()
    with pytest.raises(moeret.ConfigError, match="is there already"):
        moeret.export_index(index, tmp_path / "out")
    with pytest.raises(moeret.ConfigError, match="to must be parquet or hnswlib"):
        moeret.export_index(index, tmp_path / "new", "faiss")
    monkeypatch.setattr("moeret.retrieval.export.write_parquet", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        moeret.export_index(index, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    moeret.export_index(index, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out"]


def test_the_recipe_for_another_database_finds_what_is_nearest(tmp_path, monkeypatch, index, retriever, model_folder):
    moeret.export_index(index, tmp_path / "export")
    (tmp_path / "model").symlink_to(model_folder)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "indexing.md").read_text()
    [recipe] = [block.split("```")[0] for block in page.split("```python\n") if "QdrantClient(" in block]
    made = {}
    exec(recipe, made)
    held, vectors = retriever.held(), retriever.vectors()
    for query in QUERIES:
        [route] = retriever.model.route([query])
        asked = [name for name in made["held"] if name in route.experts] or made["held"]
        [vector] = retriever.model.encode_query([query], expert="auto")
        rows = [row for row, (expert, _) in enumerate(held) if expert in asked]
        best = sorted(vectors[rows] @ vector, reverse=True)[:3]
        points = made["search"](query, 3)
        np.testing.assert_allclose([point.score for point in points], best, atol=1e-5)
        assert all(point.payload["text"] in {held[row][1].text for row in rows} for point in points)
    year = made["models"].FieldCondition(key="metadata.year", range=made["models"].Range(gte=2021))
    found = made["search"]("the rhine", 9, made["models"].Filter(must=[year]))
    assert {point.payload["id"] for point in found} == {"l1", "l2"}
