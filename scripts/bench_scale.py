"""Cost of encoding per token, and its memory, against the size of the corpus.

  python -m scripts.bench_scale --data DATA [--sizes N ...]

DATA is a folder of BEIR folders; texts are passages of so many words out of their documents. The smallest size is measured
before and after the others, so that a machine that slows down meanwhile is seen. Half an hour on a slow core. Writes a section
of BENCHMARKS.md and docs/scale.svg.
"""

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np

import moeret
from moeret.config import DEFAULT_BASE, ExpertConfig
from moeret.data.beir import read_corpus
from moeret.models.embed import Embedder
from moeret.models.experts import base_alone
from scripts.benchmarks import FILE, markdown_table, write_section

SIZES = (1_000, 5_000, 20_000, 200_000)
WORDS = 16
REPEATS = 5
"""Of the smallest size, before and after."""
BOUND = 0.15
_MAXRSS = 1 if sys.platform == "darwin" else 1024
"""Bytes of a unit of ru_maxrss."""


def passages(data: Path, count: int) -> list[str]:
    """So many passages of WORDS words, in a mixed order."""
    texts: list[str] = []
    for path in sorted(data.glob("*/corpus.jsonl")):
        for document in read_corpus(path):
            words = document.contents.split()
            texts += [" ".join(words[start : start + WORDS]) for start in range(0, len(words), WORDS)]
    if len(texts) < count:
        raise SystemExit(f"{data} has only {len(texts)} passages of {WORDS} words; --sizes asks for {count}")
    return [texts[row] for row in np.random.default_rng(0).permutation(len(texts))[:count]]


def main() -> None:
    """Runs the benchmark and writes its section."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of BEIR folders")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="passages encoded, rising")
    arguments = parser.parse_args()
    if len(arguments.sizes) < 2 or [*arguments.sizes] != sorted(arguments.sizes):
        parser.error("--sizes must be at least two, rising")
    base = moeret.Model.load(DEFAULT_BASE).base
    embedder = Embedder(base, base_alone(base.config, ExpertConfig()))
    texts = passages(arguments.data, max(arguments.sizes))
    tokens = np.cumsum([len(ids) for ids in base.tokenizer(texts)])
    least = arguments.sizes[0]
    embedder.base(texts[: max(arguments.sizes[:-1])])  # compiles all shapes, and warms up

    def seconds_of(count: int) -> float:
        started = time.perf_counter()
        embedder.base(texts[:count])
        return time.perf_counter() - started

    before = [seconds_of(least) for _ in range(REPEATS)]
    taken, memory = {}, {}
    for count in arguments.sizes[1:]:
        taken[count] = seconds_of(count)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS
        memory[count] = (peak - 4 * count * embedder.width) / 2**20
        print(count, taken[count], memory[count], flush=True)
    after = [seconds_of(least) for _ in range(REPEATS)]
    taken = {least: statistics.median(before + after), **taken}
    cost = {count: 1e6 * own / tokens[count - 1] for count, own in taken.items()}
    drift = statistics.median(after) / statistics.median(before)
    rows = [
        [
            f"{count:,}",
            f"{tokens[count - 1]:,}",
            f"{taken[count]:.1f}",
            f"{own:.1f}",
            f"{memory[count]:.0f}" if count in memory else "",
        ]
        for count, own in cost.items()
    ]
    columns = ["passages", "tokens", "seconds", "microseconds a token", "MiB at most, without the vectors"]
    apart = max(cost.values()) / min(cost.values()) - 1
    body = [
        f"Passages of {WORDS} words by the base, in float32:",
        markdown_table(columns, rows),
        f"- cost per token differs by {apart:.1%} ({'holds' if apart <= BOUND else '**fails**'}: at most {BOUND:.0%}); {least:,} "
        f"passages took {drift:.2f} times as long afterwards as before",
        "![Microseconds a token against passages](docs/scale.svg)",
    ]
    _plot(cost)
    print("\n\n".join(body))
    write_section("scale", "Cost against corpus size", "\n\n".join(body))


def _plot(cost: dict[int, float]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "moeret"
    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    axes.plot([*cost], [*cost.values()], "o-")
    axes.set(xscale="log", xlabel="passages", ylabel="microseconds a token", ylim=(0, 1.3 * max(cost.values())))
    figure.savefig(FILE.parent / "docs" / "scale.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
