"""Devices: the only file that names mesh axes."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA = "data"


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with one axis, over which batch rows are split; the devices of all processes unless given."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA,), axis_types=(AxisType.Auto,), devices=devices)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """The tree's arrays, whole on every device."""
    return _place(tree, NamedSharding(mesh, PartitionSpec()))


def shard_rows(mesh: Mesh, tree: Any) -> Any:
    """The tree's arrays, split along their leading axis, whose length the mesh size divides."""
    return _place(tree, NamedSharding(mesh, PartitionSpec(DATA)))


def _place(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays of which every process has the whole, where a sharding wants them."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(np.shape(leaf), sharding, np.asarray(leaf).__getitem__), tree
    )
