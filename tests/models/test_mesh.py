"""Devices: a base in parts gives the vectors of the whole, and takes each device a part of the memory."""

import jax
import numpy as np
import pytest

from moeret.config import ExpertConfig
from moeret.errors import ConfigError
from moeret.models import experts
from moeret.models.embed import Embedder
from moeret.models.mesh import local_mesh, make_mesh, model_devices, row_devices
from moeret.models.pretrained import load_base
from moeret.models.router import Router

TEXTS = [
    "find the apple",
    "a very long story about the text with apple and pear",
    "kiwi",
    "gold and silver on the rhine",
] * 3


@pytest.fixture(scope="module")
def base(base_folder):
    return load_base(str(base_folder), base_folder)


def embedder_on(base, mesh):
    """Two random experts behind expert 0."""
    random, shape = np.random.default_rng(0), ExpertConfig(rank=4, layers=1)
    bank = experts.init_bank(base.config, shape, [jax.random.key(0)] * 2)
    bank = jax.tree.map(lambda leaf: (0.5 * random.normal(size=leaf.shape)).astype(np.float32), bank)
    return Embedder(base, experts.with_base(bank), mesh=mesh)


@pytest.mark.parametrize("split", [1, 2, 4])
def test_a_mesh_changes_no_vector(base, split):
    mesh = make_mesh(model_devices=split)
    assert (row_devices(mesh), model_devices(mesh)) == (4 // split, split)
    one, many = embedder_on(base, make_mesh(jax.devices()[:1])), embedder_on(base, mesh)
    np.testing.assert_allclose(many.base(TEXTS), one.base(TEXTS), atol=2e-6)
    np.testing.assert_allclose(many.alone(2).base(TEXTS), one.alone(2).base(TEXTS), atol=2e-6)
    routes = np.tile([[1, 2], [2, 0], [0, 0]], (4, 1)), np.tile([[0.6, 0.4], [1, 0], [0, 0]], (4, 1)).astype(np.float32)
    np.testing.assert_allclose(many.mixed(TEXTS, *routes), one.mixed(TEXTS, *routes), atol=2e-6)
    weights = np.random.default_rng(1).normal(size=(2 * one.width, 2)).astype(np.float32)
    router = Router("learned", "trunk", weights, np.zeros(2, np.float32), slots=2, minimum=0.0)

    def swapped(rows, choice, vectors):
        return router.pick(choice.probabilities[:, ::-1])

    for found, wanted in zip(
        many.routed(TEXTS, router, revise=swapped), one.routed(TEXTS, router, revise=swapped), strict=True
    ):
        for own, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(own, other, atol=2e-6)


def test_each_device_holds_a_part_of_the_matrices(base):
    params = embedder_on(base, make_mesh(model_devices=4)).base_encoder.params

    def held(path, leaf):
        part = leaf.addressable_shards[0].data.size / leaf.size
        whole = any("norm" in str(key) for key in path) or (leaf.ndim == 1 and part == 1)
        assert part == (1 if whole else 0.25), jax.tree_util.keystr(path)
        return leaf.addressable_shards[0].data.nbytes

    on_one = sum(jax.tree.leaves(jax.tree.map_with_path(held, params)))
    assert on_one < 0.35 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_devices_that_cannot_be_grouped_are_refused(base):
    for count in (0, 3, 8):
        with pytest.raises(ConfigError, match="model_devices must be a divisor of the 4 devices of a process"):
            make_mesh(model_devices=count)
    with pytest.raises(ConfigError, match="devices of a process, got 8"):
        local_mesh(8)
    assert local_mesh().size == 1


def test_a_matrix_that_cannot_be_split_is_named(base):
    with pytest.raises(ConfigError, match=r"cannot be split over 3 devices"):
        embedder_on(base, make_mesh(jax.devices()[:3], 3))
