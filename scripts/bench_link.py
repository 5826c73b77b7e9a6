"""What making a graph costs, and what it finds: by the order of its vectors and by how many candidates are looked at.

  python -m scripts.bench_link --index INDEX [--vectors 65536]

INDEX is one of `moeret index` with a segment of so many vectors. Queries are vectors of it with noise. Writes a section of
BENCHMARKS.md.
"""

import time
from pathlib import Path

import hnswlib
import numpy as np
import tyro

from moeret import artifact
from moeret.config import IndexConfig
from moeret.retrieval.hnsw import build_vector_index, exact_search
from moeret.retrieval.segment import KIND, open_segment
from scripts.benchmarks import markdown_table, write_section

CONSTRUCTIONS, SEARCHES = (100, 128, 200), (160, 200)
QUERIES, NOISE, K = 1000, 0.3, 10


def vectors_of(index: Path, count: int) -> np.ndarray:
    """The first vectors of an index's largest segment."""
    segments = [artifact.read(own.parent, KIND) for own in (index / "segments").glob(f"*/{artifact.MANIFEST}")]
    largest = max(segments, key=lambda own: own.meta["documents"])
    vectors = open_segment(largest, IndexConfig()).vectors
    return np.ascontiguousarray(vectors.vectors_of(np.arange(min(count, len(vectors.rows)))))


def as_given(vectors: np.ndarray, config: IndexConfig) -> hnswlib.Index:
    """A graph whose vectors are linked in the order in which they come."""
    graph = hnswlib.Index("ip", vectors.shape[1])
    graph.init_index(len(vectors), M=config.M, ef_construction=config.ef_construction, random_seed=config.seed)
    for start in range(0, len(vectors), 1000):
        graph.add_items(vectors[start : start + 1000], num_threads=1)
    return graph


def main() -> None:
    """Runs the benchmark and writes its section."""

    def measure(index: Path, vectors: int = 65536) -> None:
        every = vectors_of(index, vectors)
        random = np.random.default_rng(0)
        queries = every[random.choice(len(every), QUERIES)]
        queries = queries + random.normal(size=queries.shape).astype(np.float32) * NOISE / queries.shape[1] ** 0.5
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        _, best = exact_search(queries, every, K)
        rows = []
        for order in ("as given", "by nearness"):
            for construction in CONSTRUCTIONS:
                config = IndexConfig(ef_construction=construction, exact_below=0)
                began = time.process_time()
                graph = as_given(every, config) if order == "as given" else build_vector_index(every, config).graph
                row = [order, str(construction), f"{1000 * (time.process_time() - began) / len(every):.3f}"]
                for ef in SEARCHES:
                    graph.set_ef(ef)
                    began = time.process_time()
                    _, distances = graph.knn_query(queries, k=K, num_threads=1)
                    seconds = time.process_time() - began
                    recall = np.mean(1 - distances >= best[:, -1:] - 1e-6)
                    row += [f"{recall:.4f}", f"{1000 * seconds / QUERIES:.3f}"]
                rows.append(row)
        columns = ["order", "ef_construction", "ms a vector"]
        columns += [f"{what}, ef {ef}" for ef in SEARCHES for what in (f"recall@{K}", "ms a query")]
        body = [
            f"{len(every):,} vectors of {every.shape[1]} numbers in one graph with M {IndexConfig().M}, processor time of one "
            f"thread; {QUERIES} queries are vectors with noise of {NOISE} of their length.",
            markdown_table(columns, rows),
            f"The defaults are ef_construction {IndexConfig().ef_construction} and ef {IndexConfig().ef}, by nearness.",
        ]
        print("\n\n".join(body))
        write_section("link", "Linking", "\n\n".join(body))

    tyro.cli(measure, description=__doc__)


if __name__ == "__main__":
    main()
