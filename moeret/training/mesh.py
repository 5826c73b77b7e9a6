"""Devices: the only file that names mesh axes."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA = "data"


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with one axis, over which batch rows are split; this process's devices unless given."""
    devices = jax.local_devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA,), axis_types=(AxisType.Auto,), devices=devices)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """The tree's arrays, whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_rows(mesh: Mesh, tree: Any) -> Any:
    """The tree's arrays, split along their leading axis, whose length the mesh size divides."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(DATA)))
