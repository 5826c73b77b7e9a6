"""What counts beside the cosine is chosen on dev, remembers train alone, and never harms."""

import dataclasses

import numpy as np
import pytest

from moeret import Model, artifact
from moeret.data.beir import read_domain
from moeret.models import experts
from moeret.models.embed import Embedder
from moeret.models.memory import NEIGHBOURS, digest
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
    monkeypatch.setattr("moeret.training.blend.MOST_QUERIES", 5)
    data, encode = data
    memory = DevBlends(data).of_expert(1, data.dev[1].vectors, encode).memory
    assert memory is None or len(memory.queries) == 5 == len(memory.offsets) - 1


def test_a_blend_that_harms_unseen_queries_is_not_taken(data):
    """Queries whose vectors are right already: nothing can gain, so nothing may be added."""
    data, encode = data
    dev = data.dev[0]
    right = [dev.ids.index(next(iter(documents))) for documents in dev.judged.qrels.values()]
    perfect = data.pool[dev.documents[right]]
    blended = DevBlends(data).of_expert(0, perfect, encode)
    assert not any(blended.blend) and blended.memory is None
    assert blended.cosine_dev == blended.dev == 1.0


def test_words_serve_a_model_for_all_domains_only_where_they_gain(data):
    data, _ = data
    blends = DevBlends(data)
    perfect = []
    for dev in data.dev:
        right = [dev.ids.index(next(iter(documents))) for documents in dev.judged.qrels.values()]
        perfect.append(data.pool[dev.documents[right]])
    assert not any(blends.of_one(perfect))
    titled = dataclasses.replace(data, dev=[_by_title(data, number) for number in range(2)])
    assert DevBlends(titled).of_one([-own for own in perfect]).lexical == max(LEXICAL)


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
    assert NEIGHBOURS > 1
