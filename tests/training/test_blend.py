"""What counts beside the cosine is chosen on dev, remembers train alone, and never harms."""

import dataclasses

import numpy as np
import pytest

from moeret import Model, artifact
from moeret.data.beir import read_domain
from moeret.models import experts
from moeret.models.embed import Embedder
from moeret.models.memory import digest
from moeret.models.model import read_memory
from moeret.models.pretrained import load_base
from moeret.training.blend import LEXICAL, MEMORY, DevBlends
from moeret.training.prepare import prepare, read_domains


@pytest.fixture(scope="module")
def data(two_domains, base_folder, train_config, tmp_path_factory):
    base = load_base(str(base_folder), base_folder)
    embedder = Embedder(base, experts.base_alone(base.config, train_config.expert))
    cache = tmp_path_factory.mktemp("vectors")
    return prepare(read_domains(two_domains), embedder, train_config, cache, show_progress_bar=False), embedder.base


def test_no_expert_loses_by_its_blend_and_what_it_does_not_use_is_not_kept(model_folder):
    published = artifact.read(model_folder, "model")
    for entry in published.meta["experts"]:
        blend, dev = entry["blend"], entry["own_index_dev_ndcg"]
        assert blend["lexical"] in LEXICAL and blend["memory"] in MEMORY
        assert dev["blend"] >= dev["cosine"]
        assert (entry["memory"] is not None) == (blend["memory"] > 0)
        assert any(blend.values()) == (dev["blend"] > dev["cosine"])


def test_a_memory_is_the_train_queries_by_their_expert_and_their_answers(data, two_domains):
    data, encode = data
    blended = DevBlends(data).of_expert(0, data.dev[0].vectors, encode)
    assert blended.memory is not None  # dev asks for the documents that "about fruit nick8" was answered with
    train = read_domain("fruit", two_domains["fruit"], ("train",)).splits["train"]
    corpus = {document.id: document for document in data.domains[0].corpus}
    np.testing.assert_allclose(blended.memory.queries, encode([*train.queries.values()]), atol=1e-3)
    for row, query in enumerate(train.queries):
        start, end = blended.memory.offsets[row : row + 2]
        own = {bytes(held) for held in blended.memory.documents[start:end]}
        assert own == {digest(corpus[id].contents) for id in train.qrels[query]}


def test_a_memory_keeps_no_more_queries_than_it_may(data, monkeypatch):
    """Dev asks again, in the same words, what train asked: the memory gains whatever it keeps."""
    data, encode = data
    train = data.domains[0].splits["train"]
    dev = [dataclasses.replace(data.dev[0], judged=train, texts=[*train.queries.values()])]
    again = dataclasses.replace(
        data, dev=[dataclasses.replace(dev[0], seen=np.ones(len(train.queries), bool)), data.dev[1]]
    )
    queries = encode([*train.queries.values()])
    monkeypatch.setattr("moeret.training.blend.MOST_QUERIES", 20)
    memory = DevBlends(again).of_expert(0, queries, encode).memory
    assert len(memory.queries) == 20 == len(memory.offsets) - 1


def _vectors(data, number, wrong):
    """Each dev query's vector as its relevant document's, or as that of another for those that are `wrong`."""
    dev = data.dev[number]
    right = [dev.ids.index(next(iter(documents))) for documents in dev.judged.qrels.values()]
    rows = [(row + 1) % len(dev.ids) if bad else row for row, bad in zip(right, wrong, strict=True)]
    return data.pool[dev.documents[rows]]


def test_what_cannot_gain_is_left_out(data):
    data, encode = data
    blended = DevBlends(data).of_expert(0, _vectors(data, 0, [False] * len(data.dev[0].texts)), encode)
    assert not any(blended.blend) and blended.memory is None
    assert blended.cosine_dev == blended.dev == 1.0


def test_a_blend_that_harms_unseen_queries_is_not_taken_however_much_the_others_gain(data):
    """Words name the document of two queries in three, which is missed by vector, and mislead the third, which is found."""
    data, encode = data
    dev = data.dev[0]
    titles = {document.id: document.title for document in data.domains[0].corpus}
    seen = np.arange(len(dev.texts)) % 3 > 0
    relevant = [next(iter(documents)) for documents in dev.judged.qrels.values()]
    named = [
        titles[id] if own else " ".join(set(titles.values()) - {titles[id]})
        for id, own in zip(relevant, seen, strict=True)
    ]
    judged = dataclasses.replace(dev.judged, queries=dict(zip(dev.judged.queries, named, strict=True)))
    tried = {}
    for known in (seen, np.ones(len(seen), bool)):
        own = dataclasses.replace(data, dev=[dataclasses.replace(dev, judged=judged, seen=known), data.dev[1]])
        tried[known.all()] = DevBlends(own).of_expert(0, _vectors(data, 0, seen), encode)
    assert tried[True].blend.lexical > 0  # all of one group: the mean decides
    assert tried[True].dev > tried[False].dev
    assert tried[False].blend.lexical < tried[True].blend.lexical


def test_words_serve_a_model_for_all_domains_only_where_they_gain(data):
    data, _ = data
    perfect = [_vectors(data, number, [False] * len(dev.texts)) for number, dev in enumerate(data.dev)]
    assert not any(DevBlends(data).of_one(perfect))
    titled = dataclasses.replace(data, dev=[_by_title(data, number) for number in range(2)])
    assert DevBlends(titled).of_one([-own for own in perfect]).lexical > 0


def _by_title(data, number):
    """Dev queries that name their document by its only word."""
    dev, titles = data.dev[number], {document.id: document.title for document in data.domains[number].corpus}
    queries = {query: titles[next(iter(documents))] for query, documents in dev.judged.qrels.items()}
    return dataclasses.replace(dev, judged=dataclasses.replace(dev.judged, queries=queries))


def test_a_loaded_model_has_its_blends_and_memories(model_folder):
    model = Model.load(model_folder)
    assert model.blends.keys() == {"base", "shared", "fruit", "metal"}
    for name in model.experts:
        memory = read_memory(model.published, name)
        assert (memory is not None) == (model.blends[name].memory > 0)
        if memory is not None:
            assert memory.queries.dtype == np.float16 and memory.offsets[-1] == len(memory.documents)
