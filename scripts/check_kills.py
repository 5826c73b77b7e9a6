"""Kill -9 at random moments: training and indexing must complete when run again, with the result of an undisturbed run.

Command:  python -m scripts.check_kills [--kills 10]
Time:     about 10 minutes on 2 cores.
Expected: every rerun completes, and model and index have the fingerprints of the undisturbed ones. Writes its section
          into BENCHMARKS.md. The corpora are the quickstart's.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from moeret import artifact
from moeret.data.docstrings import write_domains
from scripts.benchmarks import markdown_table, write_section


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Kills training and indexing at random moments."""

    kills: int = 10
    """Kills of each of the two."""
    seed: int = 0
    """Chooses the moments."""


def main() -> None:
    """Runs both parts and writes the section."""
    arguments = tyro.cli(Arguments)
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        domains = write_domains(folder / "data", per_library=120, libraries=2)
        named = ["--domain", *(f"{name}={path}" for name, path in domains.items())]
        train = ["train", *named, "--steps", "12", "--shared-steps", "6", "--batch-size", "16", "--evaluate-every", "3"]
        index = ["index", str(folder / "train-undisturbed"), *named, "--exact-below", "100"]
        rows = []
        for name, command in (("train", train), ("index", index)):
            seconds = timed(command, folder / f"{name}-undisturbed")
            wanted = fingerprint(folder / f"{name}-undisturbed")
            killed, finished_early, same = 0, 0, 0
            while killed < arguments.kills:
                out = folder / f"{name}-killed"
                shutil.rmtree(out, ignore_errors=True)
                if not kill(command, out, moments.uniform(0, seconds)):
                    finished_early += 1
                    continue
                killed += 1
                timed(command, out)
                same += fingerprint(out) == wanted
            rows.append([name, f"{seconds:.0f} s", str(killed), str(finished_early), str(same)])
    columns = ["command", "undisturbed", "killed", "ended before its kill", "rerun completed, same fingerprint"]
    write_section("kills", "Kill -9 at random moments", markdown_table(columns, rows))
    if any(row[4] != str(arguments.kills) for row in rows):
        sys.exit(f"results differ after kills: {rows}")


def timed(command: list[str], out: Path) -> float:
    """Runs a command to its end, and returns its seconds. Raises CalledProcessError if it fails."""
    started = time.monotonic()
    subprocess.run([*program(), *command, "--out", str(out)], check=True, capture_output=True)
    return time.monotonic() - started


def kill(command: list[str], out: Path, after: float) -> bool:
    """Starts a command and kills it after so many seconds; False if it had ended by then."""
    process = subprocess.Popen(
        [*program(), *command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def program() -> list[str]:
    """The command line of this very installation."""
    return [sys.executable, "-m", "moeret.cli"]


def fingerprint(out: Path) -> str:
    """The fingerprint of the artifact at `out`, all of whose files are whole."""
    return artifact.read(out, "model" if out.name.startswith("train") else "index").fingerprint


if __name__ == "__main__":
    main()
