"""Devices: the only file that names mesh axes.

One mesh serves a laptop and a pod: rows of a batch are split over the DATA axis, the matrices of the base over the MODEL axis,
which has one device unless the base does not fit it. Experts have no axis: every device holds their few megabytes, and a batch
of training is of one expert, so that there would be nothing to do at once.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moeret.config import require

DATA, MODEL = "data", "model"
_COLUMNS, _ROWS = ("query", "key", "value", "mlp_in"), ("attention_output", "mlp_out")


def make_mesh(devices: Sequence[Any] | None = None, model_devices: int = 1) -> Mesh:
    """The devices of all processes, unless given, of which `model_devices` neighbours hold the base's matrices together.

    Raises:
      ConfigError: the devices cannot be grouped so.
    """
    devices = jax.devices() if devices is None else devices
    require(
        model_devices >= 1 and len(devices) % model_devices == 0,
        f"model_devices must be a divisor of the {len(devices)} devices of a process, got {model_devices}",
    )
    shape = (len(devices) // model_devices, model_devices)
    return jax.make_mesh(shape, (DATA, MODEL), axis_types=(AxisType.Auto,) * 2, devices=devices)


def local_mesh(model_devices: int = 1) -> Mesh:
    """Devices of this process alone, for inference; of CPU devices, which share a processor, no more than must be.

    Raises:
      ConfigError: there are not so many.
    """
    devices = jax.local_devices()
    return make_mesh(devices[:model_devices] if jax.default_backend() == "cpu" else devices, model_devices)


def row_devices(mesh: Mesh) -> int:
    """Over how many devices rows are split."""
    return mesh.shape[DATA]


def model_devices(mesh: Mesh) -> int:
    """Over how many devices matrices are split."""
    return mesh.shape[MODEL]


def replicate(mesh: Mesh, tree: Any) -> Any:
    """The tree's arrays, whole on every device."""
    return jax.tree.map(lambda leaf: _place(leaf, NamedSharding(mesh, PartitionSpec())), tree)


def keep_whole(mesh: Mesh, tree: Any) -> Any:
    """In a compiled program: its result is whole on every device, wherever the compiler would rather have it."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec()))


def shard_rows(mesh: Mesh, tree: Any) -> Any:
    """The tree's arrays, split along their leading axis, whose length `row_devices` divides."""
    return jax.tree.map(lambda leaf: _place(leaf, NamedSharding(mesh, PartitionSpec(DATA))), tree)


def shard_base(mesh: Mesh, params: Any) -> Any:
    """An encoder's parameters, the matrices split as in Megatron-LM (arXiv 1909.08053).

    The first of two products in a row by columns, the second by rows, so that devices exchange one sum for both; embeddings
    by width.

    Raises:
      ConfigError: a matrix cannot be split so.
    """

    def place(path: Any, leaf: Any) -> Any:
        keys = [key.key for key in path if isinstance(getattr(key, "key", None), str)]
        spec = PartitionSpec()
        if keys[-1] == "kernel" and keys[-2] in _ROWS:
            spec = PartitionSpec(MODEL, None)
        elif keys[-1] in ("kernel", "embedding"):
            spec = PartitionSpec(None, MODEL)
        elif keys[-1] == "bias" and keys[-2] in _COLUMNS:
            spec = PartitionSpec(MODEL)
        sizes = [size for size, axis in zip(leaf.shape, spec, strict=False) if axis == MODEL]
        require(
            all(size % model_devices(mesh) == 0 for size in sizes),
            f"{'.'.join(keys)} {tuple(leaf.shape)} cannot be split over {model_devices(mesh)} devices",
        )
        return _place(leaf, NamedSharding(mesh, spec))

    return jax.tree.map_with_path(place, params)


def _place(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array of which every process has the whole, where a sharding wants it."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(np.shape(array), sharding, np.asarray(array).__getitem__)
