"""Checkpoints: what comes back is what was saved, on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np

from moeret.models.mesh import make_mesh, replicate, shard_rows
from moeret.training.checkpoint import Checkpoints


def test_the_newest_two_are_kept_and_the_newest_comes_back(tmp_path):
    tree = {"a": jnp.arange(8.0), "b": {"c": jnp.int32(3)}}
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(tree) is None
        for step in (5, 10, 15):
            checkpoints.save(step, jax.tree.map(lambda leaf, s=step: leaf + jnp.asarray(s, leaf.dtype), tree))
        step, back = checkpoints.restore(tree)
    assert step == 15 and int(back["b"]["c"]) == 18
    np.testing.assert_array_equal(back["a"], np.arange(8.0) + 15)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["10", "15"]


def test_a_checkpoint_of_four_devices_restores_on_one(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, {"a": shard_rows(make_mesh(), jnp.arange(8.0))})
    one = make_mesh(jax.devices()[:1])
    with Checkpoints(tmp_path / "c") as checkpoints:
        _, back = checkpoints.restore({"a": replicate(one, jnp.zeros(8))})
    np.testing.assert_array_equal(back["a"], np.arange(8.0))
    assert back["a"].sharding.mesh.size == 1


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, {"a": jnp.zeros(2)})
        checkpoints.save(1, {"a": jnp.ones(2)})
        np.testing.assert_array_equal(checkpoints.restore({"a": jnp.zeros(2)})[1]["a"], np.zeros(2))
