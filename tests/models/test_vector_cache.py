"""Kept vectors: no text is embedded twice, and none gets another's vector."""

import numpy as np
import pytest

from moeret.models import vector_cache
from moeret.models.vector_cache import cached_vectors

TEXTS = [f"text {number}" for number in range(12)]


class Calls:
    """Stands for an embedding function and counts the texts that it was given."""

    def __init__(self):
        self.texts = 0

    def __call__(self, texts):
        self.texts += len(texts)
        return np.array([[sum(map(ord, text)), len(text), 2] for text in texts], np.float32)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A call of cached_vectors over chunks of four texts: returns (vectors, texts embedded, texts found)."""
    monkeypatch.setattr(vector_cache, "_CHUNK", 4)

    def run(texts, *folders, key="encoder"):
        calls, found = Calls(), []
        paths = [tmp_path / name for name in folders or ("own",)]
        vectors = cached_vectors(calls, texts, 3, paths, key, found.append)
        np.testing.assert_array_equal(vectors, Calls()(texts))
        return calls.texts, sum(found)

    return run


def test_a_second_call_embeds_nothing(cached):
    assert cached(TEXTS[:10]) == (10, 0)
    assert cached(TEXTS[:10]) == (0, 10)


def test_other_texts_or_another_encoder_are_not_mixed_up(cached):
    cached(TEXTS[:10])
    assert cached([*TEXTS[:9], "new"]) == (2, 8)
    assert cached(TEXTS[:10], key="another") == (10, 0)


def test_chunks_are_found_in_every_folder_and_written_to_the_first(cached, tmp_path):
    cached(TEXTS[:8], "old")
    assert cached(TEXTS[:12], "own", "old") == (4, 8)
    assert [len(list((tmp_path / name).iterdir())) for name in ("old", "own")] == [2, 1]


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw[:40] + b"!" + raw[41:], lambda raw: b""])
def test_a_damaged_chunk_is_embedded_again(cached, tmp_path, damage):
    cached(TEXTS[:10])
    victim = sorted((tmp_path / "own").iterdir(), key=lambda path: path.stat().st_size)[-1]
    victim.write_bytes(damage(victim.read_bytes()))
    assert cached(TEXTS[:10]) == (4, 6)
    assert cached(TEXTS[:10]) == (0, 10)
