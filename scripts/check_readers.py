"""Threads search an index while a process publishes snapshots of it: no error, nothing deleted or outdated, nothing leaks.

Command:  python -m scripts.check_readers [--minutes 10] [--snapshots 200] [--threads 8]
Time:     the minutes, and about 5 more.
Expected: every search finds documents of the very snapshot that it was made on, as many as are due, and all bounds hold. Writes
          its section into BENCHMARKS.md. The corpora are the quickstart's.
"""

import gc
import multiprocessing
import random
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import moeret
from moeret.artifact import MANIFEST
from moeret.config import IndexConfig, TrainConfig
from moeret.data.docstrings import write_domains
from scripts.benchmarks import markdown_table, write_section
from scripts.check_kills import read, write

Key = tuple[str, str]
"""A document's domain and id."""
INDEX = IndexConfig(exact_below=100, segment_documents=1000)
TRAIN = TrainConfig(steps=12, shared_steps=6, batch_size=16, evaluate_every=6)
K = 10
REPLACED, DELETED, ADDED = 3, 2, 2
"""Documents of each source that a snapshot replaces, deletes and adds; half of the added were deleted before."""
JOINED_EVERY = 20
"""Of so many snapshots one is a compaction's."""
POLL_SECONDS = 0.05
SLOWER, GROWN = 2.0, 1.05
"""Bounds: p99 against the quiet one, memory against that at the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Searches an index by many threads while it is changed."""

    minutes: float = 10
    """How long snapshots are published."""
    snapshots: int = 200
    """How many, evenly over the minutes if that can be done."""
    threads: int = 8
    """How many search."""
    quiet: float = 60
    """Seconds of searching before the first is published."""
    documents: int = 300
    """Documents of each of the three sources at most."""
    seed: int = 0
    """Chooses what is changed."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What the process holds."""

    mebibytes: float
    files: int
    segments: int

    @classmethod
    def now(cls, retriever: moeret.Retriever) -> "Usage":
        """After what is no longer used is given back."""
        gc.collect()
        status = Path("/proc/self/status").read_text()
        segments = sum(len(entry["segments"]) for entry in retriever.index.meta["experts"].values())
        return cls(
            int(status.partition("VmRSS:")[2].split()[0]) / 1024, len([*Path("/proc/self/fd").iterdir()]), segments
        )


class Corpus:
    """The documents of all sources, and in files what each snapshot holds: (domain, id) -> version."""

    def __init__(self, folder: Path, documents: int = 0):
        """Makes the files, if `documents` are asked for."""
        self.folder, self.index = folder, folder / "index"
        if documents:
            for path in write_domains(folder / "data", per_library=documents, libraries=3).values():
                write(
                    path / "corpus.jsonl", ({**row, "text": row["text"][:300]} for row in read(path / "corpus.jsonl"))
                )
        *self.domains, self.other = sorted(path.name for path in (folder / "data").iterdir())
        self.rows = {
            ("" if name == self.other else name, row["_id"]): row
            for name in (*self.domains, self.other)
            for row in read(folder / "data" / name / "corpus.jsonl")
        }
        self.queries = [row["text"] for name in self.domains for row in read(folder / "data" / name / "queries.jsonl")]
        self.live = lru_cache(maxsize=4)(self._live)

    def given(self, documents: dict[Key, int]) -> tuple[dict[str, Path], list[Path]]:
        """Files of these versions of documents: the domains', and those without one."""
        for domain in (*self.domains, ""):
            rows = [
                self.rows[key] | _version(self.rows[key], own) for key, own in documents.items() if key[0] == domain
            ]
            write(self._given(domain), rows)
        return {domain: self._given(domain).parent for domain in self.domains}, [self._given("")]

    def _given(self, domain: str) -> Path:
        return self.folder / "given" / (domain or "loose") / "corpus.jsonl"

    def note(self, snapshot: int, live: dict[Key, int]) -> None:
        """Says what a snapshot that is to be published holds."""
        write(self._note(snapshot), ({"key": key, "version": own} for key, own in live.items()))

    def _live(self, snapshot: int) -> dict[Key, int]:
        return {(*row["key"],): row["version"] for row in read(self._note(snapshot))}

    def _note(self, snapshot: int) -> Path:
        return self.folder / "live" / f"{snapshot}.jsonl"


def _version(row: dict[str, Any], version: int) -> dict[str, Any]:
    return {"text": f"Version {version}. {row['text']}", "metadata": {"version": version}}


class Readers:
    """Threads that search one retriever and check what they find, and one that reloads it."""

    def __init__(self, corpus: Corpus, threads: int):
        self.corpus, self.threads = corpus, threads
        self.retriever = moeret.Retriever.load(corpus.index)
        self.milliseconds: list[float] = []
        self.reloads: list[float] = []
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        self.seen: set[int] = set()
        self._over, self._lock = threading.Event(), threading.Lock()

    def warm_up(self) -> None:
        """Lets everything be compiled: each query alone, as experts embed it and as the base does."""
        for query in self.corpus.queries:
            for route in ("auto", "base"):
                self.retriever.search(query, K, route=route)

    def search(self, until: Callable[[], bool]) -> list[float]:
        """Searches until then, and returns the milliseconds that each search took."""
        self.milliseconds = []
        self._over.clear()
        threads = [threading.Thread(target=self._search, args=(own,)) for own in range(self.threads)]
        threads.append(threading.Thread(target=self._reload))
        for thread in threads:
            thread.start()
        while not until() and not self.errors:
            time.sleep(POLL_SECONDS)
        self._over.set()
        for thread in threads:
            thread.join()
        return self.milliseconds

    def _search(self, thread: int) -> None:
        chance = random.Random(thread)
        while not self._over.is_set():
            try:
                self._once(chance.choice(self.corpus.queries), chance)
            except Exception:
                self.errors.append(traceback.format_exc())
                return

    def _once(self, query: str, chance: random.Random) -> None:
        route, filtered = chance.choice([("auto", False), ("auto", True), ("all", False), ("base", False)])
        oldest = self.retriever.index.snapshot // 2 if filtered else 0
        started = time.perf_counter()
        found = self.retriever.rank([query], K, route=route, where={"version": {"gte": oldest}} if filtered else None)
        [hits] = self.retriever.hits(found)
        milliseconds = 1000 * (time.perf_counter() - started)
        snapshot = found.snapshot.published.snapshot
        live = {key: own for key, own in self.corpus.live(snapshot).items() if own >= oldest}
        # Without a filter the router's choice of indexes decides, of which the largest alone has so many.
        due = len(live) if filtered or route != "auto" else max(found.snapshot.sizes[name] for name in found.indexes[0])
        keys = [(hit.domain, hit.id) for hit in hits]
        said = [(hit.text.partition(". ")[0], hit.metadata["version"]) for hit in hits]
        true = [(f"Version {live[key]}", live[key]) if key in live else None for key in keys]
        with self._lock:
            self.milliseconds.append(milliseconds)
            self.seen.add(snapshot)
            self.counts["searches"] += 1
            self.counts["with too few hits"] += len(set(keys)) != min(K, due)
            self.counts["deleted documents"] += true.count(None)
            self.counts["other versions"] += sum(own not in (None, mine) for own, mine in zip(true, said, strict=True))

    def _reload(self) -> None:
        manifest = self.corpus.index / MANIFEST
        before = None
        while not self._over.is_set():
            try:
                now = (manifest.stat().st_ino, manifest.stat().st_mtime_ns)
                if now != before:
                    started = time.perf_counter()
                    if self.retriever.reload():
                        self.reloads.append(1000 * (time.perf_counter() - started))
                    before = now
            except Exception:
                self.errors.append(traceback.format_exc())
                return
            time.sleep(POLL_SECONDS)


def main() -> None:
    """Makes an index, searches it first in quiet and then while it changes, and writes the section."""
    arguments = tyro.cli(Arguments)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Corpus(Path(scratch), arguments.documents)
        if ended(process(make, corpus.folder)):
            sys.exit("no index could be made")
        readers = Readers(corpus, arguments.threads)
        readers.warm_up()
        readers.search(lasting(arguments.quiet / 2))
        quiet = readers.search(lasting(arguments.quiet))
        usages = [Usage.now(readers.retriever)]
        seconds = 60 * arguments.minutes
        writer = process(publish, corpus.folder, arguments.snapshots, seconds, arguments.seed)
        half = lasting(seconds / 2)

        def over() -> bool:
            if half() and len(usages) == 1:
                usages.append(Usage.now(readers.retriever))
            return not writer.is_alive()

        during = readers.search(over)
        if writer.is_alive():  # a search has failed
            writer.terminate()
        exit_code = ended(writer)
        readers.retriever.reload()
        usages.append(Usage.now(readers.retriever))
        holds = report(arguments, readers, quiet, during, usages, exit_code)
    if not holds:
        sys.exit("\n".join(["not all holds", *readers.errors[:3]]))


def process(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Starts a process that shares nothing with this one."""
    started = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True)
    started.start()
    return started


def ended(process: BaseProcess) -> int:
    """Waits for a process, gives its pipes back, and returns its exit code."""
    process.join()
    code = process.exitcode
    process.close()
    return code


def lasting(seconds: float) -> Callable[[], bool]:
    """Whether so many seconds from now are over."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def make(folder: Path) -> None:
    """Trains a model and builds the first snapshot with it."""
    corpus = Corpus(folder)
    moeret.train({name: folder / "data" / name for name in corpus.domains}, folder / "model", config=TRAIN)
    first = dict.fromkeys(corpus.rows, 1)
    moeret.build_index(folder / "model", corpus.index, *corpus.given(first), config=INDEX)
    corpus.note(1, first)


def publish(folder: Path, snapshots: int, seconds: float, seed: int) -> None:
    """The writer."""
    corpus, chance, started = Corpus(folder), random.Random(seed), time.monotonic()
    live = corpus.live(1).copy()
    for done in range(snapshots):
        time.sleep(max(0, started + done * seconds / snapshots - time.monotonic()))
        snapshot = done + 2
        if snapshot % JOINED_EVERY:
            given, gone = change(corpus, live, snapshot, chance)
            corpus.note(snapshot, live)
            published = moeret.update_index(corpus.index, *corpus.given(given), gone).published
        else:
            corpus.note(snapshot, live)
            published = moeret.compact_index(corpus.index)
        if published.snapshot != snapshot:
            raise RuntimeError(f"snapshot {published.snapshot} was published, not {snapshot}")


def change(
    corpus: Corpus, live: dict[Key, int], snapshot: int, chance: random.Random
) -> tuple[dict[Key, int], dict[str, list[str]]]:
    """Changes what lives; returns what is to be given, and the ids to be deleted."""
    given, gone = {}, {}
    for domain in (*corpus.domains, ""):
        mine = [key for key in live if key[0] == domain]
        dead = [key for key in corpus.rows if key[0] == domain and key not in live]
        chosen = chance.sample(mine, REPLACED + DELETED)
        again = chance.sample(dead, min(len(dead), ADDED // 2))
        copied = [(id, f"{id}-{snapshot}") for _, id in chance.sample(mine, ADDED - len(again))]
        new = {(domain, name): {**corpus.rows[domain, id], "_id": name} for id, name in copied}
        corpus.rows |= new
        given |= dict.fromkeys([*chosen[:REPLACED], *again, *new], snapshot)
        gone[domain] = [id for _, id in chosen[REPLACED:]]
        for key in chosen[REPLACED:]:
            del live[key]
    live |= given
    return given, gone


def report(
    arguments: Arguments,
    readers: Readers,
    quiet: Sequence[float],
    during: Sequence[float],
    usages: Sequence[Usage],
    exit_code: int,
) -> bool:
    """Writes the section; whether all holds."""
    counts, (start, *_, end) = readers.counts, usages
    wrong = [key for key in counts if key != "searches" and counts[key]]
    faults = ", ".join(f"{counts[key]:,} {key}" for key in counts if key != "searches")
    last = readers.retriever.index.snapshot
    ratio, grown = np.percentile(during, 99) / np.percentile(quiet, 99), end.mebibytes / start.mebibytes
    beyond = [own.files - own.segments for own in (start, end)]
    bounds = {
        f"{counts['searches']:,} searches, {len(readers.errors)} errors; {faults}": not wrong and not readers.errors,
        f"{last - 1} of {arguments.snapshots} snapshots published, {len(readers.seen) - 1} of them searched": exit_code
        == 0
        and last == arguments.snapshots + 1,
        f"p99 {ratio:.2f} times the quiet one (at most {SLOWER})": ratio <= SLOWER,
        f"memory {grown:.3f} times that at the start (at most {GROWN})": grown <= GROWN,
        f"open files beyond one a segment: {beyond[0]} at the start, {beyond[1]} at the end": beyond[1] <= beyond[0],
    }
    speed = [
        [name, f"{len(own):,}", *(f"{np.percentile(own, share):.0f}" for share in (50, 99, 100))]
        for name, own in (("quiet", quiet), ("while snapshots are published", during), ("reloads", readers.reloads))
        if own
    ]
    held = [
        [name, f"{own.mebibytes:.0f}", str(own.files), str(own.segments)]
        for name, own in zip(("start", "middle", "end") if len(usages) == 3 else ("start", "end"), usages, strict=True)
    ]
    sizes = readers.retriever.index.meta["documents"]["count"]
    body = [
        f"{arguments.threads} threads of one process search an index of {sizes:,} documents, while another process publishes "
        f"{arguments.snapshots} snapshots in {arguments.minutes:g} minutes, every {JOINED_EVERY}th by compaction; an update "
        f"replaces {REPLACED}, deletes {DELETED} and adds {ADDED} documents of each of three sources. The writer takes one of "
        "the cores while it works. Routes are auto, all and base; a quarter of the searches have a filter.",
        markdown_table(["", "count", "p50 ms", "p99 ms", "longest ms"], speed),
        markdown_table(["readers' process", "resident MiB", "open files", "segments"], held),
        "\n".join(f"- {what} ({'holds' if holds else '**fails**'})" for what, holds in bounds.items()),
    ]
    print("\n\n".join(body))
    write_section("readers", "Searching while snapshots are published", "\n\n".join(body))
    return all(bounds.values())


if __name__ == "__main__":
    main()
