"""Routed search against one index over the pool: the same queries, the same base, interleaved in one run.

  python -m scripts.bench_search --index INDEX --data DATA [--queries N] [--repeats R]

INDEX is one of `moeret index`; DATA a folder with the BEIR folders of its experts. The peers encode with sentence-transformers,
unrouted, and search all the index's documents in one HNSW graph of hnswlib or FAISS with the same M, ef_construction and ef; it
needs an environment with all of these. Test queries of all experts, mixed. Writes a section of BENCHMARKS.md.
"""

import argparse
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

import moeret
from moeret.config import IndexConfig
from moeret.data.beir import read_domain
from moeret.data.lexical import stems
from scripts.benchmarks import fast_precision, interleaved_seconds, markdown_table, write_section

Search = Callable[[Sequence[str]], object]
BOUND = 1.5
CLIENTS = (1, 8)
K = 10


def test_queries(retriever: moeret.Retriever, data: Path, count: int) -> list[str]:
    """About so many test queries, as many of each expert's domain, mixed."""
    queries: list[str] = []
    for name in retriever.model.experts:
        test = read_domain(name, data / name, ("test",), ()).splits["test"]
        queries += [*test.queries.values()][: count // len(retriever.model.experts)]
    np.random.default_rng(0).shuffle(queries)
    return queries


def peers(retriever: moeret.Retriever, folder: str) -> dict[str, Search]:
    """One index over the pool, by two libraries, behind sentence-transformers."""
    import faiss
    import hnswlib
    import torch
    from sentence_transformers import SentenceTransformer

    config = IndexConfig()
    vectors = retriever.vectors()[retriever.distinct()]
    graph = hnswlib.Index("ip", vectors.shape[1])
    graph.init_index(len(vectors), M=config.M, ef_construction=config.ef_construction, random_seed=config.seed)
    graph.add_items(vectors)
    graph.set_ef(config.ef)
    other = faiss.IndexHNSWFlat(vectors.shape[1], config.M, faiss.METRIC_INNER_PRODUCT)
    other.hnsw.efConstruction, other.hnsw.efSearch = config.ef_construction, config.ef
    other.add(vectors)

    def encoder(**how: object) -> Callable[[Sequence[str]], np.ndarray]:
        base = SentenceTransformer(folder, device="cpu", **how)
        return lambda queries: base.encode(list(queries), normalize_embeddings=True)

    encode = encoder()
    searches = {
        "sentence-transformers + hnswlib": lambda queries: graph.knn_query(encode(queries), k=K),
        "sentence-transformers + FAISS": lambda queries: other.search(encode(queries), K),
    }
    if fast_precision() == "bfloat16":
        rounded = encoder(model_kwargs={"dtype": torch.bfloat16})
        searches["sentence-transformers, bfloat16 + FAISS"] = lambda queries: other.search(rounded(queries), K)
    return searches


def batched(searches: dict[str, Search], queries: Sequence[str], repeats: int) -> dict[str, float]:
    """Median queries a second of each, all queries at once."""
    seconds = interleaved_seconds({name: lambda run=search: run(queries) for name, search in searches.items()}, repeats)
    return {name: len(queries) / own for name, own in seconds.items()}


def one_by_one(search: Search, queries: Sequence[str], clients: int) -> tuple[float, float, float]:
    """(p50, p99) milliseconds of a query, and queries a second, by so many clients that ask one after another."""
    milliseconds: list[float] = []

    def client(own: Sequence[str]) -> None:
        for query in own:
            started = time.perf_counter()
            search([query])
            milliseconds.append(1000 * (time.perf_counter() - started))

    threads = [threading.Thread(target=client, args=(queries[number::clients],)) for number in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = len(queries) / (time.perf_counter() - started)
    return float(np.percentile(milliseconds, 50)), float(np.percentile(milliseconds, 99)), rate


def split(retriever: moeret.Retriever, queries: Sequence[str], repeats: int) -> dict[str, float]:
    """Median milliseconds a query of each part of a batched search; the last is what the others leave."""
    model = retriever.model
    embedder, router = model.embedder, model.query_router
    texts = model.with_prompt(queries, "query")
    reads = embedder.readings(texts, reads=router.reads)
    found = retriever.rank(queries, K)
    runs = {
        "tokenise": lambda: model.base.tokenizer(texts),
        "words": lambda: stems(queries),
        "trunk": lambda: [*embedder.states(texts)],
        "route": lambda: router.choose(reads),
        "trunk and branch": lambda: embedder.routed(texts, router),
        "fetch": lambda: retriever.hits(found),
        "whole": lambda: retriever.search_batch(queries, K),
    }
    parts = {name: 1000 * own / len(queries) for name, own in interleaved_seconds(runs, repeats).items()}
    encode = parts.pop("trunk and branch")
    whole = parts.pop("whole")
    parts["trunk"] -= parts["tokenise"]
    parts["branch"] = encode - parts["trunk"] - parts["tokenise"] - parts["route"]
    return {
        **parts,
        "evidence, HNSW, words, memory, fusion, branch again": whole - sum(parts.values()),
        "whole": whole,
    }


def main() -> None:
    """Runs the benchmark and writes its section."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--index", type=Path, required=True, help="index directory")
    parser.add_argument("--data", type=Path, required=True, help="folder with the BEIR folders of the index's experts")
    parser.add_argument("--queries", type=int, default=600, help="how many queries, as many of each expert")
    parser.add_argument("--repeats", type=int, default=5, help="how often each is timed")
    arguments = parser.parse_args()
    retriever = moeret.Retriever.load(arguments.index)
    queries = test_queries(retriever, arguments.data, arguments.queries)
    others = peers(retriever, str(retriever.model.base.folder))
    ours = {"moeret, routed": lambda own: retriever.search_batch(own, K)}
    if fast_precision() == "bfloat16":
        rounded = moeret.Retriever.load(arguments.index, precision="bfloat16")
        ours["moeret, routed, bfloat16"] = lambda own: rounded.search_batch(own, K)
    searches = {**ours, **others}
    rates = batched(searches, queries, arguments.repeats)
    rows = []
    for name, search in searches.items():
        cells = [f"{rates[name]:.1f}"]
        for clients in CLIENTS:
            one_by_one(search, queries[: len(queries) // 3], clients)
            p50, p99, rate = one_by_one(search, queries, clients)
            cells += [f"{p50:.1f}", f"{p99:.1f}", f"{rate:.1f}"]
        rows.append([name, *cells])
    columns = ["system", "queries/s, batched"]
    columns += [
        f"{what}, {clients} client{'s' * (clients > 1)}"
        for clients in CLIENTS
        for what in ("p50 ms", "p99 ms", "queries/s")
    ]
    ratio = max(rates[name] for name in ours) / max(rates[name] for name in others)
    parts = split(retriever, queries, arguments.repeats)
    whole = parts["whole"]
    shares = [[name, f"{own:.3f}", f"{own / whole:.1%}"] for name, own in parts.items()]
    body = [
        f"{len(queries)} test queries of {len(retriever.model.experts)} domains over {sum(retriever.sizes.values()):,} documents, "
        f"{K} hits each, medians of {arguments.repeats}. The peers find less: they search with the base alone.",
        markdown_table(columns, rows),
        f"- the faster of ours: {ratio:.2f} times the fastest peer's batched queries a second "
        f"({'holds' if ratio >= BOUND else '**fails**'}: at least {BOUND})",
        "Where a batched query's time goes, in float32:",
        markdown_table(["part", "ms a query", "share"], shares),
    ]
    print("\n\n".join(body))
    extra = {name: version(name) for name in ("sentence-transformers", "torch", "faiss-cpu")}
    write_section("search", "Searching", "\n\n".join(body), extra)


if __name__ == "__main__":
    main()
