"""What an index would cost is told from graphs that are really linked."""

import numpy as np

from moeret.config import IndexConfig
from moeret.retrieval import estimate


def test_sample_graphs_are_linked_however_few_documents_need_no_graph(monkeypatch):
    linked = []

    def build(vectors, config):
        linked.append(len(vectors) >= config.exact_below)

    monkeypatch.setattr(estimate, "build_vector_index", build)
    monkeypatch.setattr(estimate, "_FEW", 16)
    monkeypatch.setattr(estimate, "_MANY", 64)
    vectors = np.eye(8, dtype=np.float32)
    config = IndexConfig(exact_below=1000, segment_documents=5000)
    assert estimate._link_seconds(vectors, 5000, config) > 0
    assert linked and all(linked)
    assert estimate._link_seconds(vectors, 999, config) == 0
