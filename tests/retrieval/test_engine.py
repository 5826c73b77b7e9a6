"""Shards are encoded side by side, and end together when one of them cannot be."""

import threading
from types import SimpleNamespace

import pytest

from moeret.config import IndexConfig
from moeret.data.sources import Shard, Source
from moeret.retrieval.engine import encode_documents
from moeret.retrieval.shards import ShardTask
from moeret.types import Document


def given(tmp_path, count):
    """So many shards of one document."""
    source = Source(tmp_path / "corpus.jsonl")
    return [
        (Shard(number, source, number, number + 1, 0, 1, ()), [Document(str(number), "x")]) for number in range(count)
    ]


class Encoder:
    """Stands in for what embeds: calls what it is given with a shard's number and its bar."""

    def __init__(self, embed):
        self.embed = embed

    def publish(self, shard, documents, folder, advance):
        self.embed(shard.number, advance)
        return SimpleNamespace(meta={"experts": {f"expert{shard.number % 5}": 1000}})


def run(tmp_path, embed, *, shards, at_once, advance=lambda count, note: None):
    task = ShardTask(tmp_path, tmp_path, IndexConfig())
    encode_documents(task, Encoder(embed), iter(given(tmp_path, shards)), at_once, advance)


def test_every_shard_is_encoded_once_and_as_many_at_once_as_asked_for(tmp_path):
    seen, together = [], threading.Barrier(3, timeout=30)

    def embed(number, advance):
        together.wait()  # breaks where fewer than three are encoded at once
        seen.append(number)
        advance(1)

    advanced = []
    run(tmp_path, embed, shards=9, at_once=3, advance=lambda count, note: advanced.append((count, note)))
    assert sorted(seen) == [*range(9)]
    assert sum(count for count, _ in advanced) == 9


def test_a_bar_tells_the_padding_and_the_experts_that_got_most(tmp_path):
    notes = []
    run(
        tmp_path,
        lambda number, advance: advance(1, f"{number}% padding"),
        shards=7,
        at_once=1,
        advance=lambda count, note: notes.append(note),
    )
    assert [*dict.fromkeys(notes)][:4] == ["", "0% padding", "0% padding, expert0 1,000", "1% padding, expert0 1,000"]
    assert notes[-1] == "6% padding, expert0 2,000, expert1 2,000, expert2 1,000, 2 more experts"


def test_an_error_in_one_shard_ends_the_others_at_their_next_batch(tmp_path):
    begun = threading.Barrier(2, timeout=30)

    def embed(number, advance):
        begun.wait()
        if number == 0:
            raise OSError("the disk is full")
        while True:  # batch after batch of a shard that never ends
            advance(0)

    with pytest.raises(OSError, match="the disk is full"):
        run(tmp_path, embed, shards=5, at_once=2)


def test_an_interrupt_ends_all(tmp_path, monkeypatch):
    begun = threading.Event()

    def embed(number, advance):
        begun.set()
        while True:
            advance(0)

    def interrupted(workers):
        begun.wait(30)
        raise KeyboardInterrupt

    monkeypatch.setattr("moeret.retrieval.engine.as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, embed, shards=5, at_once=2)


def test_a_shard_that_cannot_be_read_ends_the_job_with_its_error(tmp_path):
    def broken():
        yield from given(tmp_path, 1)
        raise ValueError("line 7")

    encoded = []
    task = ShardTask(tmp_path, tmp_path, IndexConfig())
    with pytest.raises(ValueError, match="line 7"):
        encode_documents(
            task, Encoder(lambda number, advance: encoded.append(number)), broken(), 2, lambda count, note: None
        )
    assert encoded == [0]
