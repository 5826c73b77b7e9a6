"""Ways to add each text's own mix of experts to one layer's products: which is fastest, for how many experts.

  python -m scripts.bench_mixing [--repeats R]

Columns: the factors of all experts in use side by side, of which each token takes its text's; also with texts in groups that use
few experts, one group after another, which is what moeret does. Gather: each text's own factors. Grouped product: tokens sorted by
expert, `jax.lax.ragged_dot`. All on the same texts, in float32. A minute. Writes a section of BENCHMARKS.md.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import moeret
from moeret.config import DEFAULT_BASE, ExpertConfig
from moeret.data.buckets import packs
from moeret.models.encoder import matrix_shapes
from moeret.models.experts import MOST_USED, Mixture, few_experts, gather
from scripts.benchmarks import interleaved_seconds, markdown_table, write_section

EXPERTS = (1, 8, 64)
SLOTS, TEXTS, TOKENS = 2, 24, 21
IN_GROUPS = f"columns, {MOST_USED} experts at a time at most"
Factors = dict[str, dict[str, Array]]
Product = Callable[[dict[int, Array], Factors, Mixture, Array, Array], list[Array]]


def columns(inputs: dict[int, Array], layer: Factors, mixture: Mixture, texts: Array, slots: Array) -> list[Array]:
    """As `experts.gather` lays them out."""
    deltas = gather({"layer": layer}, None, mixture, texts)["layer"]
    return [(inputs[own["a"].shape[0]] @ own["a"] * own["weights"]) @ own["b"] for own in deltas.values()]


def gathered(inputs: dict[int, Array], layer: Factors, mixture: Mixture, texts: Array, slots: Array) -> list[Array]:
    """Each text a row of its own, with its own factors."""
    flat = texts.reshape(-1)
    rows = jnp.stack([jnp.nonzero(flat == text, size=TOKENS)[0] for text in range(TEXTS)])
    weights = jnp.take_along_axis(mixture.weights[:TEXTS], slots, axis=1)

    def product(own: dict[str, Array]) -> Array:
        x = inputs[own["a"].shape[1]]
        hidden = jnp.einsum("tli,tsir->tlsr", x.reshape(-1, x.shape[-1])[rows], own["a"][slots])
        out = jnp.einsum("tlsr,tsro->tlo", hidden * weights[:, None, :, None], own["b"][slots])
        whole = (
            jnp.zeros((len(flat), out.shape[-1]), jnp.float32).at[rows.reshape(-1)].set(out.reshape(-1, out.shape[-1]))
        )
        return whole.reshape(*x.shape[:-1], -1)

    return [product(own) for own in layer.values()]


def grouped(inputs: dict[int, Array], layer: Factors, mixture: Mixture, texts: Array, slots: Array) -> list[Array]:
    """A token for each expert of its text, sorted by expert."""
    flat = jnp.where(texts < 0, 0, texts).reshape(-1)
    which, count = slots[flat].reshape(-1), slots.shape[1]
    order = jnp.argsort(which, stable=True)
    tokens, sizes = order // count, jnp.bincount(which, length=len(mixture.experts)).astype(jnp.int32)
    weights = jnp.where(texts.reshape(-1) < 0, 0.0, 1.0)[tokens] * mixture.weights[flat[tokens], which[order]]

    def product(own: dict[str, Array]) -> Array:
        x = inputs[own["a"].shape[1]]
        hidden = jax.lax.ragged_dot(x.reshape(-1, x.shape[-1])[tokens], own["a"], sizes) * weights[:, None]
        out = jax.ops.segment_sum(jax.lax.ragged_dot(hidden, own["b"], sizes), tokens, num_segments=len(flat))
        return out.reshape(*x.shape[:-1], -1)

    return [product(own) for own in layer.values()]


Problem = tuple[dict[int, Array], Factors, Mixture, Int[Array, "B L"], Int[Array, "T S"]]


def problems(experts: int, shapes: dict[str, tuple[int, int]], rank: int) -> tuple[Problem, list[Problem]]:
    """Texts that mix SLOTS of so many experts each, as what each of the products takes: in one pack, and in groups."""
    random = np.random.default_rng(0)

    def draw(*shape: int) -> Float[Array, "..."]:
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    layer = {name: {"a": draw(experts, i, rank), "b": draw(experts, rank, o)} for name, (i, o) in shapes.items()}
    slots = np.stack([random.permutation(experts)[: min(SLOTS, experts)] for _ in range(TEXTS)])

    def packed(rows: Int[np.ndarray, "T"], *, alone: bool) -> Problem:
        """With a bank of the used experts `alone`, or as moeret takes them out of all there are."""
        [pack] = packs(np.full(len(rows), TOKENS))
        _, _, texts, _ = pack.arrays([np.zeros(TOKENS, np.int32)] * len(rows))
        used, places = np.unique(slots[rows], return_inverse=True)
        places = places.reshape(slots[rows].shape)
        weights = np.zeros((pack.most, len(used)), np.float32)
        np.put_along_axis(weights[: len(rows)], places, 1 / slots.shape[1], axis=1)
        chosen = np.arange(len(used)) if alone else used
        bank = jax.tree.map(lambda leaf: leaf[used], layer) if alone else layer
        mixture = Mixture(jnp.asarray(chosen), jnp.asarray(weights), jnp.zeros(pack.most))
        inputs = {width: draw(*texts.shape, width) for width, _ in shapes.values()}
        return inputs, bank, mixture, jnp.asarray(texts), jnp.asarray(places)

    groups = few_experts(slots, np.ones(slots.shape))
    return packed(np.arange(TEXTS), alone=True), [packed(rows, alone=False) for rows in groups]


def main() -> None:
    """Runs the benchmark and writes its section."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=20, help="how often each is timed")
    arguments = parser.parse_args()
    encoder, shape = moeret.Model.load(DEFAULT_BASE).base.config, ExpertConfig()
    shapes = {name: own for name, own in matrix_shapes(encoder).items() if name in shape.matrices}
    kernels = {name: jnp.ones(own, jnp.float32) for name, own in shapes.items()}
    own_products = jax.jit(lambda inputs: [inputs[kernel.shape[0]] @ kernel for kernel in kernels.values()])
    ways: dict[str, Product] = {"columns": columns, "gather": gathered, "grouped product (ragged_dot)": grouped}
    rows: dict[str, list[str]] = {name: [] for name in ("the base's own products", IN_GROUPS, *ways)}
    for experts in EXPERTS:
        (inputs, *rest), groups = problems(experts, shapes, shape.rank)
        compiled = {name: jax.jit(way) for name, way in ways.items()}
        found = {name: [np.asarray(own) for own in way(inputs, *rest)] for name, way in compiled.items()}
        kept = np.asarray(rest[2] >= 0)  # padding may hold anything
        for name, own in found.items():
            for one, other in zip(own, found["columns"], strict=True):
                np.testing.assert_allclose(one[kept], other[kept], atol=1e-2 * np.abs(other).max(), err_msg=name)
        runs: dict[str, Callable[[], object]] = {
            name: lambda way=way, arguments=(inputs, *rest): jax.block_until_ready(way(*arguments))
            for name, way in compiled.items()
        }
        runs[IN_GROUPS] = lambda way=compiled["columns"], groups=groups: jax.block_until_ready(
            [way(*own) for own in groups]
        )
        runs["the base's own products"] = lambda own=inputs: jax.block_until_ready(own_products(own))
        for name, seconds in interleaved_seconds(runs, arguments.repeats).items():
            rows[name].append(f"{1000 * seconds:.1f}")
    table = [[name, *cells] for name, cells in rows.items()]
    columns_of = ["milliseconds", *(f"of {count} expert{'s' * (count > 1)}" for count in EXPERTS)]
    body = (
        f"One layer's {len(shapes)} matrices, rank {shape.rank}, {TEXTS} texts of {TOKENS} tokens packed, each of which mixes "
        f"{SLOTS} of the experts, medians of {arguments.repeats}:\n\n{markdown_table(columns_of, table)}"
    )
    print(body)
    write_section("mixing", "Mixing experts in a layer", body)


if __name__ == "__main__":
    main()
