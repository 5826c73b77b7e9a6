"""Segments joined into one."""

import gc
import weakref

import numpy as np

from moeret import artifact
from moeret.config import IndexConfig
from moeret.retrieval.segment import joined, open_segment


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
