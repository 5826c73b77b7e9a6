"""Kill -9 at random moments: commands must complete when run again, with the result of an undisturbed run.

Command:  python -m scripts.check_kills [--kills 10] [--commands train index update compact ray] [--at-once 2]
Time:     about 30 minutes on 2 cores, most of it train.
Expected: after each kill an index holds and finds what it did before or what it is to, and nothing between; every rerun
          completes, and then documents, hits with their scores and fingerprint are those of the undisturbed run, ids are
          unique, verification finds nothing and nothing is left of the job. `ray` is the indexing job on Ray, of which a worker
          is killed and the command itself must complete; needs the extra. Writes its section into BENCHMARKS.md. The corpora
          are the quickstart's.
"""

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import tyro

import moeret
from moeret import artifact
from moeret.data.docstrings import write_domains
from moeret.retrieval.job import FOLDER
from scripts.benchmarks import markdown_table, write_section

Name = Literal["train", "index", "update", "compact", "ray"]
COLUMNS = {
    "killed": "killed",
    "early": "ended before its kill",
    "old": "held the old",
    "new": "held the new",
    "completed": "rerun completed",
    "same": "same results",
}
STEPS = ["--steps", "12", "--shared-steps", "6", "--batch-size", "16", "--evaluate-every", "3"]
CUT = ["--shard-documents", "20", "--segment-documents", "50", "--exact-below", "30"]
"""Many shards, and several segments for each expert, some of them graphs."""
QUERIES = 20
START_UP = 0.2
"""Share of a command's time in which it only imports; kills come later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Kills commands at random moments."""

    kills: int = 10
    """Kills of each command."""
    commands: tuple[Name, ...] = ("train", "index", "update", "compact")
    """Which commands are killed."""
    at_once: int = 1
    """Commands that are tested side by side."""
    seed: int = 0
    """Chooses the moments."""


@dataclass(frozen=True, slots=True)
class Victim:
    """A command that makes `--out` or changes it in place; `prepared` is what it changes, if anything.

    With `on_ray` one of its workers is killed, and it must end by itself.
    """

    words: list[str]
    prepared: Path | None = None
    on_ray: bool = False

    def run(self, out: Path, after: float | None = None, *, job: bool = False) -> tuple[int | None, float]:
        """Its exit code, None if it was killed so many seconds after its start, and how many seconds after that it ended.

        With `job` seconds count from when the job that it does has begun.
        """
        process = subprocess.Popen(
            [*program(), *self.words, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        started = time.monotonic()
        while job and process.poll() is None and not (out / FOLDER).exists():
            time.sleep(0.002)
            started = time.monotonic()
        try:
            _, complaint = process.communicate(timeout=after)
        except subprocess.TimeoutExpired:
            killed = _kill_worker(process) if self.on_ray else process.kill()
            _, complaint = process.communicate()
            if killed and not process.returncode:
                return None, time.monotonic() - started
        seconds = time.monotonic() - started
        if process.returncode == -signal.SIGKILL:
            return None, seconds
        if process.returncode:
            print(f"{self.words[0]} failed:\n{complaint}", file=sys.stderr)
        return process.returncode, seconds

    def prepare(self, out: Path) -> None:
        """Puts back what there was before the command."""
        shutil.rmtree(out, ignore_errors=True)
        if self.prepared:
            shutil.copytree(self.prepared, out)


def _kill_worker(driver: subprocess.Popen[str]) -> bool:
    """Kills a process that encodes or links for a driver, as soon as there is one; whether there was before the driver ended."""
    import psutil

    while driver.poll() is None:
        for own in psutil.Process(driver.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any(word in " ".join(own.cmdline()) for word in ("_Actor", "_linked")):
                    own.kill()
                    return True
        time.sleep(0.01)
    return False


@dataclass(frozen=True, slots=True)
class State:
    """What is at a place: the fingerprint, and of an index what it holds, and what it finds for each query, best first."""

    fingerprint: str
    documents: frozenset[tuple[str, str, str]] = frozenset()
    hits: list[list[tuple[str, str, float]]] = field(default_factory=list)

    @classmethod
    def of(cls, out: Path, queries: Sequence[str]) -> "State | None":
        """None where nothing is published. Raises if what is there cannot be loaded or has an id twice."""
        if not artifact.exists(out):
            return None
        if json.loads((out / artifact.MANIFEST).read_text())["kind"] == "model":
            return cls(artifact.read(out, "model").fingerprint)
        retriever = moeret.Retriever.load(out)
        every = retriever.search(queries[0], 100_000, route="all")
        if len({(hit.domain, hit.id) for hit in every}) < len(every):
            raise RuntimeError(f"{out} has ids twice")
        hits = [[(hit.domain, hit.id, hit.score) for hit in own] for own in retriever.search_batch(queries, 10)]
        retriever.close()
        return cls(retriever.index.fingerprint, frozenset((hit.domain, hit.id, hit.text) for hit in every), hits)


def main() -> None:
    """Kills every command and writes the section."""
    arguments = tyro.cli(Arguments)
    rows, ends = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        victims, queries = prepare(folder)

        def tested(name: Name) -> tuple[float, Counter[str]]:
            moments = random.Random(f"{name} {arguments.seed}")
            seconds, counts = test(victims[name], folder / f"{name} killed", arguments.kills, moments, queries)
            print(name, dict(counts), flush=True)
            return seconds, counts

        with ThreadPoolExecutor(arguments.at_once) as threads:
            for name, (seconds, counts) in zip(
                arguments.commands, threads.map(tested, arguments.commands), strict=True
            ):
                rows.append([name, f"{seconds:.0f} s", *(str(counts[key]) for key in COLUMNS)])
                whole = [counts["completed"], counts["same"], counts["old"] + counts["new"]]
                ends.append(whole == [arguments.kills] * 3)
    body = [
        f"Half of the moments are uniform over a command's time but for the first {START_UP:.0%}, in which it imports; the others "
        "over the time after its job has begun (of train all are of the first kind). *Old* is what there was before: nothing, "
        "or the earlier snapshot with its documents, hits and scores. *Same results*: documents, hits and scores of "
        f"{QUERIES} queries and fingerprint are the undisturbed run's, ids are unique, verification finds nothing, nothing is "
        "left of the job. Of *ray*, the job on Ray, a worker is killed, and the command itself completes without a rerun.",
        markdown_table(["command", "undisturbed", *COLUMNS.values()], rows),
    ]
    print("\n\n".join(body))
    write_section("kills", "Kill -9 at random moments", "\n\n".join(body))
    if not all(ends):
        sys.exit("results differ after kills")


def prepare(folder: Path) -> tuple[dict[Name, Victim], list[str]]:
    """The commands, with all that they need, and queries."""
    domains = write_domains(folder / "data", per_library=120, libraries=3)
    *named, other = domains
    named, loose = {name: domains[name] for name in named}, folder / "loose.jsonl"
    write(loose, ({**row, "text": row["text"][:200]} for row in read(domains[other] / "corpus.jsonl")[:100]))
    every = [row["text"] for path in domains.values() for row in read(path / "queries.jsonl")]
    given = [*(word for name, path in named.items() for word in ("--domain", f"{name}={path}")), "--corpus", str(loose)]
    train = Victim(["train", *given[:-2], *STEPS, "--out"])
    finish(train, model := folder / "model")
    index = Victim(["index", str(model), *given, *CUT, "--out"])
    finish(index, built := folder / "built")
    update = ["index", str(model), "--update"]
    changes = [change(folder / f"change{number}", number, named, loose) for number in range(4)]
    shutil.copytree(built, crowded := folder / "crowded")
    for own in changes[1:]:
        finish(Victim([*update, *own, "--out"]), crowded)
    victims: dict[Name, Victim] = {
        "train": train,
        "index": index,
        "update": Victim([*update, *changes[0], "--out"], built),
        "compact": Victim(["compact"], crowded),
        "ray": Victim(["index", str(model), *given, *CUT, "--engine", "ray", "--out"], on_ray=True),
    }
    return victims, every[:: len(every) // QUERIES][:QUERIES]


def change(folder: Path, number: int, domains: Mapping[str, Path], loose: Path) -> list[str]:
    """Arguments of an update: of every source 10 documents replaced, 5 deleted, 5 unchanged and 5 new ones."""
    words = []
    for name, corpus in {**{name: path / "corpus.jsonl" for name, path in domains.items()}, "": loose}.items():
        rows, own = read(corpus)[20 * number : 20 * (number + 1)], folder / (name or "loose")
        replaced = [{**row, "text": f"Version {number}. {row['text'][:200]}"} for row in rows[:10]]
        added = [{**row, "_id": f"{row['_id']}-{number}", "text": row["text"][-200:]} for row in rows[10:15]]
        write(own / "corpus.jsonl", [*replaced, *rows[15:], *added])
        write(own / "gone.jsonl", ({"_id": row["_id"]} for row in rows[10:15]))
        words += ["--domain", f"{name}={own}"] if name else ["--corpus", str(own / "corpus.jsonl")]
        words += ["--delete", f"{name}={own / 'gone.jsonl'}".lstrip("=")]
    return words


def test(
    victim: Victim, folder: Path, kills: int, moments: random.Random, queries: Sequence[str]
) -> tuple[float, Counter[str]]:
    """Seconds of an undisturbed run, and what became of so many killed ones."""
    counts: Counter[str] = Counter()
    undisturbed, out = folder / "undisturbed", folder / "killed"
    kinds = [False] if victim.words[0] == "train" else [False, True]
    longest = {}
    for job in [False, *kinds]:  # the first makes what is compiled
        victim.prepare(undisturbed)
        longest[job] = finish(victim, undisturbed, job=job)
    seconds = longest[False]
    victim.prepare(out)
    old, new = State.of(out, queries), State.of(undisturbed, queries)
    while counts["killed"] < kills:
        victim.prepare(out)
        job = kinds[counts["killed"] % len(kinds)]
        code, ended = victim.run(out, moments.uniform(0 if job else START_UP, 1) * longest[job], job=job)
        if code is not None:
            if code:
                sys.exit(f"{victim.words[0]} failed before it was killed")
            counts["early"] += 1
            longest[job] = min(longest[job], ended)
            continue
        left = State.of(out, queries)
        completed = victim.on_ray or victim.run(out)[0] == 0
        after = State.of(out, queries) if completed else None
        same = completed and after == new and clean(out)
        if left not in (old, new):
            print(
                f"{victim.words[0]} killed after {ended:.3f} s: neither the old nor the new: {_difference(left, old)}"
            )
        if not same:
            print(f"{victim.words[0]} killed after {ended:.3f} s: rerun gave other results: {_difference(after, new)}")
        counts.update(killed=1, old=+(left == old), new=+(left == new), completed=+completed, same=+same)
    return seconds, counts


def _difference(given: State | None, wanted: State | None) -> str:
    """What of one state is not as in the other."""
    if not (given and wanted):
        return "there is none" if wanted else "there was none before"
    differ = [own.name for own in fields(State) if getattr(given, own.name) != getattr(wanted, own.name)]
    scores = [
        abs(one[2] - two[2])
        for mine, others in zip(given.hits, wanted.hits, strict=True)
        for one, two in zip(mine, others, strict=False)
        if one[:2] == two[:2]
    ]
    return f"{', '.join(differ) or 'leftovers or problems'}; scores differ by up to {max(scores, default=0):.1e}"


def finish(victim: Victim, out: Path, *, job: bool = False) -> float:
    """Runs a command to its end, and returns its seconds."""
    code, seconds = victim.run(out, job=job)
    if code:
        sys.exit(f"{victim.words[0]} cannot be run")
    return seconds


def clean(out: Path) -> bool:
    """Whether nothing is left of a job, and an index's verification finds nothing."""
    kind = json.loads((out / artifact.MANIFEST).read_text())["kind"]
    return not (out / FOLDER).exists() and (kind == "model" or not moeret.verify_index(out)["problems"])


def program() -> list[str]:
    """The command line of this very installation."""
    return [sys.executable, "-m", "moeret.cli"]


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
