"""The model's public calls: who encodes, what is refused, and what comes back."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import moeret
from moeret import artifact
from moeret.config import ExpertConfig
from moeret.errors import ArtifactError, BaseEncoderError, ConfigError
from moeret.models import experts
from moeret.models.model import KIND, WORK
from moeret.models.pretrained import load_base
from moeret.models.router import centroid_router

QUERIES = ["find the apple", "about a very long iron", "which plum is a story", "the zinc"]
close = {"atol": 2e-6, "rtol": 0}


def make_model(base, tower: str = "query") -> moeret.Model:
    """A model in memory with two random experts and a router that knows a word of each."""
    random = np.random.default_rng(0)
    bank = experts.init_bank(base.config, ExpertConfig(rank=4, layers=1), list(jax.random.split(jax.random.key(0), 2)))
    bank = jax.tree.map(lambda leaf: (0.5 * random.normal(size=leaf.shape)).astype(np.float32), bank)
    vectors = moeret.Model(base).encode_query(QUERIES)
    router = centroid_router([vectors[[0, 2]], vectors[[1, 3]]])
    return moeret.Model(
        base, tower=tower, names=("fruit", "metal"), bank=bank, query_router=router, document_router=router
    )


@pytest.fixture(scope="module")
def base(base_folder):
    return load_base(str(base_folder), base_folder)


@pytest.fixture(scope="module")
def model(base):
    return make_model(base)


@pytest.fixture(scope="module")
def bare(base):
    return moeret.Model(base)


def test_vectors_are_unit_float32_rows(model):
    for expert in (None, "fruit", "auto"):
        vectors = model.encode_query(QUERIES, expert=expert)
        assert vectors.shape == (4, 16) and vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_no_expert_and_the_expert_named_base_are_the_base(model, bare):
    plain = bare.encode_query(QUERIES)
    for expert in (None, "base", ["base", None, "base", None], {}, {"base": 1.0}, {"metal": 0.0}):
        np.testing.assert_allclose(model.encode_query(QUERIES, expert=expert), plain, **close)


def test_a_name_for_each_text_is_each_text_by_its_name(model):
    names = ["fruit", "metal", "base", "fruit"]
    together = model.encode_query(QUERIES, expert=names)
    for row, name in enumerate(names):
        np.testing.assert_allclose(together[row], model.encode_query(QUERIES, expert=name)[row], **close)
    spread = [np.abs(together - model.encode_query(QUERIES, expert=name)).max() for name in ("fruit", "metal", "base")]
    assert min(spread) > 1e-2


def test_a_mapping_merges_deltas_by_weight(model):
    alone = model.encode_query(QUERIES, expert="fruit")
    np.testing.assert_allclose(model.encode_query(QUERIES, expert={"fruit": 1.0}), alone, **close)
    both = model.encode_query(QUERIES, expert={"fruit": 0.6, "metal": 0.4})
    np.testing.assert_allclose(model.encode_query(QUERIES, expert={"metal": 0.4, "fruit": 0.6}), both, **close)
    assert np.abs(both - alone).max() > 1e-2


def test_auto_is_each_query_by_its_own_route(model):
    automatic = model.encode_query(QUERIES, expert="auto")
    for query, vector, route in zip(QUERIES, automatic, model.route(QUERIES), strict=True):
        assert set(route.probabilities) == {"fruit", "metal"} and not route.abstained
        np.testing.assert_allclose(sum(route.probabilities.values()), 1, rtol=1e-5)
        assert next(iter(route.experts)) == max(route.probabilities, key=route.probabilities.get)
        np.testing.assert_allclose(model.encode_query([query], expert=route.experts)[0], vector, **close)


def test_auto_keeps_the_length_of_vectors_that_the_base_does_not_normalise(base_folder, tmp_path):
    folder = Path(shutil.copytree(base_folder, tmp_path / "base"))
    (folder / "modules.json").unlink()
    raw = make_model(load_base(str(folder), folder))
    routes = raw.route(QUERIES)
    automatic = raw.encode_query(QUERIES, expert="auto")
    own = [raw.encode_query([query], expert=route.experts)[0] for query, route in zip(QUERIES, routes, strict=True)]
    np.testing.assert_allclose(automatic, np.stack(own), atol=1e-5)
    assert np.abs(np.linalg.norm(automatic, axis=1) - 1).min() > 1e-2
    lengths = np.linalg.norm(raw.encode_query(QUERIES, expert="auto", normalize_embeddings=True), axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-5)


def test_documents_follow_the_expert_only_where_experts_have_document_towers(base, model, bare):
    plain = bare.encode_document(QUERIES)
    np.testing.assert_allclose(model.encode_document(QUERIES, expert="fruit"), plain, **close)
    both = make_model(base, tower="both")
    np.testing.assert_allclose(both.encode_document(QUERIES), plain, **close)
    np.testing.assert_allclose(
        both.encode_document(QUERIES, expert="fruit"), both.encode_query(QUERIES, expert="fruit"), **close
    )
    assert np.abs(both.encode_document(QUERIES, expert="fruit") - plain).max() > 1e-2


@pytest.mark.parametrize("expert", ["law", ["fruit", "law", "metal", "base"], {"law": 1.0}])
def test_an_unknown_expert_is_named_with_the_known_ones(model, expert):
    for encode in (model.encode_query, model.encode_document):
        with pytest.raises(ConfigError, match="no expert 'law'; this model has base, fruit, metal"):
            encode(QUERIES, expert=expert)


def test_names_must_be_as_many_as_texts(model):
    with pytest.raises(ConfigError, match="2 experts for 4 texts"):
        model.encode_query(QUERIES, expert=["fruit", "metal"])


def test_a_bare_base_cannot_route(bare):
    for call in (lambda: bare.route(QUERIES), lambda: bare.encode_query(QUERIES, expert="auto")):
        with pytest.raises(ConfigError, match="no experts and so no router"):
            call()


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ("one text", r"must be a list of strings, got str; for one text pass \[text\]"),
        (7, "must be a list of strings, got int"),
        (None, "must be a list of strings, got NoneType"),
        (iter(["a"]), "must be a list of strings"),
        (["fine", 3], r"\[1\] must be a string, got int"),
        (["fine", None], r"\[1\] must be a string, got NoneType"),
        ([b"bytes"], r"\[0\] must be a string, got bytes"),
        ([["nested"]], r"\[0\] must be a string, got list"),
        (["fine", "half a pair \ud83d"], r"\[1\] is not valid Unicode text"),
    ],
)
def test_inputs_that_are_no_list_of_texts_are_refused(model, inputs, expected):
    for call in (model.encode_query, model.encode_document, model.route):
        with pytest.raises(ConfigError, match=expected):
            call(inputs)


def test_no_texts_give_no_rows(model):
    for expert in (None, "fruit", "auto", [], {"fruit": 0.5, "metal": 0.5}):
        vectors = model.encode_query([], expert=expert)
        assert vectors.shape == (0, 16) and vectors.dtype == np.float32
    assert model.encode_document([]).shape == (0, 16)
    assert model.route([]) == []


def test_odd_texts_are_encoded_like_any_other(model):
    texts = [
        "",
        " \n\t",
        "\x00",
        "apple\x00iron",
        "👍🏽 👨‍👩‍👧 🚀",
        "مرحبا שלום 你好",
        "x" * 1_000_000,
        "apple " * 166_667,
    ]
    assert max(map(len, texts)) >= 1_000_000
    vectors = model.encode_query(texts, expert="fruit")
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[1], **close)
    np.testing.assert_allclose(vectors[-1], model.encode_query(["apple " * 100], expert="fruit")[0], **close)


def test_tuples_are_lists_too(model):
    np.testing.assert_array_equal(model.encode_query(tuple(QUERIES)), model.encode_query(QUERIES))


def test_a_trained_model_comes_back_from_its_folder(model_folder, bare):
    first, again = moeret.Model.load(model_folder), moeret.Model.load(str(model_folder))
    assert first.experts == ("fruit", "metal") and first.tower == "query"
    assert first.published.fingerprint == again.published.fingerprint
    vectors = first.encode_query(QUERIES, expert="auto")
    np.testing.assert_array_equal(again.encode_query(QUERIES, expert="auto"), vectors)
    np.testing.assert_allclose(first.encode_query(QUERIES), bare.encode_query(QUERIES), **close)
    assert np.abs(vectors - bare.encode_query(QUERIES)).max() > 1e-3


def test_a_damaged_model_is_refused(model_folder, tmp_path):
    root = Path(shutil.copytree(model_folder, tmp_path / "model"))
    name = artifact.read(root, KIND).meta["experts"][0]["file"]
    raw = bytearray((root / name).read_bytes())
    raw[-1] ^= 1
    (root / name).write_bytes(raw)
    with pytest.raises(ArtifactError, match="SHA-256"):
        moeret.Model.load(root)
    (root / name).unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        moeret.Model.load(root)


def test_an_unfinished_model_is_refused(tmp_path):
    (tmp_path / WORK).mkdir()
    with pytest.raises(ArtifactError, match="no finished model"):
        moeret.Model.load(tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"neither a moeret model .* nor a base encoder"):
        moeret.Model.load(tmp_path)
    artifact.Draft(tmp_path, "index").publish({})
    with pytest.raises(ArtifactError, match=r"is an index; expected a model$"):
        moeret.Model.load(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(BaseEncoderError, match="there is no folder"):
        moeret.Model.load(tmp_path / "missing")
