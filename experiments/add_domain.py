"""A domain that the model never saw is added with one command: what it gains, what it costs the others.

Command:  python -m experiments.add_domain --data DATA [--model runs/pooled_domains/seed-0/model] [--out runs/add_domain]
          DATA and --model as experiments.pooled_domains leaves them. The new domain is the Python standard library's
          documentation on this machine.
Time:     about 6 minutes on 2 cores.
Expected: no other expert's file changes by a byte, and the new domain gains. The others' nDCG@10 falls by at most 0.3
          points. Writes its table into BENCHMARKS.md.
"""

import hashlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

import moeret
from experiments.folders import made_from
from experiments.pooled_domains import TRAINED
from moeret.data.docstrings import STANDARD_LIBRARY, write_domains
from moeret.metrics import NDCG
from scripts.benchmarks import markdown_table, write_section

LOSS = 0.003
"""Of nDCG@10 that a domain of before may lose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Adds an expert to a finished model."""

    data: Path
    """Folder of the BEIR folders."""
    model: Path = Path("runs/pooled_domains/seed-0/model")
    """A finished model of the ten domains."""
    out: Path = Path("runs/add_domain")
    """Where the new model and the indexes go."""
    steps: int = 50
    """Training steps at most."""


def main() -> None:
    """Runs the experiment and writes its section."""
    arguments = tyro.cli(Arguments)
    out = made_from(arguments.out, arguments.model, arguments.steps)
    model = out / "model"
    if not model.is_dir():
        shutil.copytree(arguments.model, model, ignore=shutil.ignore_patterns("checkpoints"))
    new = write_domains(out / "data", per_library=600, libraries=1)
    before = digests(arguments.model)
    started = time.monotonic()
    added = moeret.add_expert(
        model,
        STANDARD_LIBRARY,
        new[STANDARD_LIBRARY],
        config=moeret.TrainConfig(steps=arguments.steps),
        show_progress_bar=True,
    )
    seconds = time.monotonic() - started
    after = digests(model)
    changed = [name for name in before if before[name] != after.get(name)]

    old = {name: arguments.data / name for name in TRAINED}
    reports = {}
    for name, source, domains in (("before", arguments.model, old), ("after", model, {**old, **new})):
        moeret.build_index(source, out / f"index-{name}", domains, show_progress_bar=True)
        retriever = moeret.Retriever.load(out / f"index-{name}")
        reports[name] = moeret.evaluate(retriever, domains, baselines=name == "after", show_progress_bar=True)
    rows = []
    for name in {**old, **new}:
        own = {when: report["domains"].get(name, {}).get(NDCG) for when, report in reports.items()}
        base = reports["after"]["systems"]["base_one_index"]["domains"][name][NDCG]
        change = "" if own["before"] is None else f"{100 * (own['after'] - own['before']):+.2f}"
        rows.append([name, "" if own["before"] is None else f"{100 * own['before']:.1f}", f"{100 * own['after']:.1f}", change,
                     f"{100 * base:.1f}"])  # fmt: skip
    expert = added.meta["experts"][-1]
    body = "\n\n".join(
        [
            "Routed nDCG@10 x 100 on test, pooled, before and after adding the standard library's documentation "
            f"({expert['documents']:,} documents, {expert['train_queries']:,} training queries); the pool grows by them:",
            markdown_table(["domain", "before", "after", "change", "base, one HNSW, after"], rows),
            f"{changes(*({name: report['domains'][name][NDCG] for name in old} for report in reports.values()))}\n"
            f"- other experts' files and profiles changed: {len(changed)} of {len(before)}\n"
            f"- dev nDCG@10 x 100 of the new expert: {100 * expert['base_dev_ndcg']['all']:.1f} as the base, "
            f"{100 * expert['dev_ndcg']['all']:.1f} with it (step {expert['step']})\n"
            f"- seconds to add it in this call: {seconds:.0f}",
        ]
    )
    write_section("add-domain", "Adding a domain to a finished model", body)


def changes(before: dict[str, float], after: dict[str, float]) -> str:
    """Whether no domain of before lost more than it may."""
    differences = {name: after[name] - before[name] for name in before}
    worst = min(differences, key=differences.get)
    holds = "holds" if differences[worst] >= -LOSS else "**fails**"
    return f"- the worst of the domains before ({worst}): {100 * differences[worst]:+.2f} ({holds}: at least {-100 * LOSS:g})"


def digests(model: Path) -> dict[str, str]:
    """SHA-256 of every expert's files."""
    return {
        path.relative_to(model).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("experts", "profiles")
        for path in (model / folder).iterdir()
    }


if __name__ == "__main__":
    main()
