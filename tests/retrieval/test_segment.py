"""Segments joined into one."""

import gc
import weakref

import numpy as np
import pytest

from moeret import artifact
from moeret.config import IndexConfig
from moeret.retrieval import hnsw
from moeret.retrieval.build import build_index
from moeret.retrieval.segment import joined, open_segment
from moeret.retrieval.update import compact_index, update_index
from moeret.retrieval.verify import verify_index


def test_what_is_joined_holds_nothing_of_its_parts_but_their_open_files(index_folder):
    folders = sorted((index_folder / "segments").iterdir())[:1]
    parts = [open_segment(artifact.read(folder, "segment"), IndexConfig()) for folder in folders]
    kept = [np.arange(len(part)) % 2 == 0 for part in parts]
    wanted = [document for part, own in zip(parts, kept, strict=True) for document in part.documents(own)]
    stores, vectors = [part.store for part in parts], [weakref.ref(part.vectors.vectors) for part in parts]
    content = joined([*zip(parts, kept, strict=True)])
    del parts
    gc.collect()
    assert [reference() for reference in vectors] == [None]
    assert [*content.documents] == wanted and len(content.vectors) == len(wanted)
    for store in stores:
        store.close()


def test_no_graph_is_loaded_to_build_change_or_join_segments(tmp_path, model_folder, two_domains, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(hnsw, "_load", lambda *_: pytest.fail("a graph was loaded"))
        built = build_index(model_folder, tmp_path / "index", two_domains, config=IndexConfig(exact_below=4))
        assert all("recall@10" in own for entry in built.meta["experts"].values() for own in entry["segments"])
        update_index(tmp_path / "index", delete={"fruit": ["d0"]})
        compact_index(tmp_path / "index")
    assert verify_index(tmp_path / "index")["problems"] == []
