"""The commands that make models."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from moeret.cli.arguments import Domains, Flat
from moeret.config import DEFAULT_BASE, OnError, TrainConfig, require
from moeret.data.beir import parse_domains
from moeret.data.convert import Columns, convert_dataset, convert_file
from moeret.terminal import OUT, complain, print_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Quickstart:
    """Train, index, evaluate and search the documentation of the Python libraries on this machine: the tutorial.

    Needs nothing but the base encoder, and a few minutes. Run again, it goes on where it was cut off.
    """

    out: Path = Path("quickstart")
    """Directory for corpora, model and index."""

    def run(self) -> None:
        from moeret.quickstart import quickstart

        quickstart(self.out, OUT, show_progress_bar=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Convert:
    """Make a domain's folder out of training rows as sentence-transformers has them: anchor, positive, negatives.

    Examples: moeret convert law.jsonl --out data/law,
    moeret convert --dataset somebody/law --split train --anchor question --positive answer --out data/law,
    moeret convert rows.jsonl --corpus documents.jsonl --id doc_id --title heading --text body --out data/law
    """

    file: tyro.conf.Positional[Path | None] = None
    """JSONL (also .gz) with a row a line: "anchor" (or "query", "question"), "positive" (or "answer"), and any "negative"s."""
    dataset: str | None = None
    """Instead of a file, a data set: OWNER/NAME on the Hugging Face hub, or a folder; needs pip install ".[datasets]"."""
    subset: str | None = None
    """With --dataset: its subset (configuration), where it has several."""
    split: str = "train"
    """With --dataset: its split."""
    corpus: Path | None = None
    """JSONL (also .gz) of the domain's documents: each positive is one of them, its text or id. Else rows' texts are documents."""
    columns: Annotated[tyro.conf.OmitArgPrefixes[Columns], Flat] = field(default_factory=Columns)
    on_error: OnError = "stop"
    """What a row or document that cannot be used does: stop, or be skipped and listed in skipped.jsonl."""
    out: Path
    """BEIR folder to make."""
    json: bool = False
    """Print as JSON."""

    def run(self) -> None:
        require((self.file is None) != (self.dataset is None), "give either a file of rows or --dataset, and not both")
        require(self.dataset is not None or self.subset is None, "--subset goes with --dataset")
        named = [name for name in ("id", "title", "text") if getattr(self.columns, name) != getattr(Columns(), name)]
        require(self.corpus is not None or not named, f"--{named[0] if named else ''} goes with --corpus")
        how = {"columns": self.columns, "corpus": self.corpus, "on_error": self.on_error}
        if self.dataset is None:
            counts = convert_file(self.file, self.out, **how)
        else:
            counts = convert_dataset(self.dataset, self.out, subset=self.subset, split=self.split, **how)
        if self.json:
            print_json(counts)
        else:
            OUT.print(f"{self.out}: {', '.join(f'{count:,} {name}' for name, count in counts.items())}", markup=False)
            if counts.get("skipped"):
                complain(f"{counts['skipped']:,} were skipped; {self.out / 'skipped.jsonl'} says which and why")


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """Train one expert per domain and a router, and publish them as a model directory.

    Interrupted, it loses at most the steps since the last checkpoint: the same command goes on. Only the train and dev
    splits are read; without a dev split a tenth of train is set aside.

    Example: moeret train --domain law=data/law --domain jobs=data/jobs --out model
    """

    domain: Domains
    """NAME=BEIR_DIR of each domain."""
    out: Path
    """Model directory to make; checkpoints and metrics.jsonl lie in its folder training."""
    base: str = DEFAULT_BASE
    """Base encoder: a local folder or a hub id."""
    distributed: str | None = None
    """One of several processes that train together: auto (TPU pods, Slurm, Open MPI), or HOST:PORT,PROCESS/PROCESSES."""
    model_devices: int = 1
    """Devices that hold the base together, where it does not fit one."""
    config: Annotated[TrainConfig, Flat] = field(default_factory=TrainConfig)
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        from moeret.processes import is_first, join
        from moeret.training.run import train

        domains = parse_domains([item for group in self.domain for item in group])
        join(self.distributed)
        shown = is_first() and not self.json
        how = {"config": self.config, "model_devices": self.model_devices, "show_progress_bar": shown}
        published = train(domains, self.out, base=self.base, **how)
        if is_first():
            _print_experts(published.meta, self.json)
        if shown:
            OUT.print(f"Model: {self.out}", markup=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsList:
    """Show the experts of a model: how they did on dev, and on how much data."""

    model: tyro.conf.Positional[Path]
    """Model directory."""
    json: bool = False
    """Print as JSON."""

    def run(self) -> None:
        from moeret import artifact

        _print_experts(artifact.read(self.model, "model").meta, self.json)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsAdd:
    """Train experts for new domains and add them to a model. The other experts' files do not change by a byte.

    Indexes know the model they were built with: build the index anew afterwards.
    """

    model: tyro.conf.Positional[Path]
    """Model directory."""
    domain: Domains
    """NAME=BEIR_DIR of each new domain."""
    label_free: bool = False
    """Nobody has judged queries: make them from the titles and texts of corpus.jsonl, which then is all that is read."""
    peft: Path | None = None
    """Folder of a PEFT LoRA adapter for the model's base that becomes the expert: nothing is trained, whatever --steps says."""
    config: Annotated[tyro.conf.OmitSubcommandPrefixes[TrainConfig], Flat] = field(default_factory=TrainConfig)
    json: bool = False
    """Print the model's experts as JSON."""

    def run(self) -> None:
        from moeret.training.prepare import read_domains
        from moeret.training.run import add_expert

        domains = parse_domains([item for group in self.domain for item in group])
        require(bool(domains), "there is no domain to add; give at least one --domain NAME=BEIR_DIR")
        require(
            self.peft is None or len(domains) == 1, "--peft is one domain's expert: give one --domain NAME=BEIR_DIR"
        )
        read_domains(domains, label_free=self.label_free)  # all are fit before the first is trained
        for name, path in domains.items():
            options = {"label_free": self.label_free, "peft": self.peft, "show_progress_bar": not self.json}
            published = add_expert(self.model, name, path, config=self.config, **options)
        _print_experts(published.meta, self.json)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsRemove:
    """Take an expert out of a model. The other experts' files do not change by a byte."""

    model: tyro.conf.Positional[Path]
    """Model directory."""
    name: tyro.conf.Positional[str]
    """The expert's name."""
    json: bool = False
    """Print the remaining experts as JSON."""

    def run(self) -> None:
        from moeret.training.run import remove_expert

        _print_experts(remove_expert(self.model, self.name).meta, self.json)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """List, add or remove the experts of a model."""

    command: (
        Annotated[ExpertsList, tyro.conf.subcommand("list")]
        | Annotated[ExpertsAdd, tyro.conf.subcommand("add")]
        | Annotated[ExpertsRemove, tyro.conf.subcommand("remove")]
    )

    def run(self) -> None:
        self.command.run()


def _print_experts(meta: dict[str, Any], as_json: bool) -> None:
    keys = (
        "name", "documents", "train_queries", "base_dev_ndcg", "dev_ndcg", "step", "strength", "shared_strength", "blend",
        "own_index_dev_ndcg",
    )  # fmt: skip
    rows = [{key: entry[key] for key in keys} for entry in meta["experts"]]
    router = meta["router"]
    if as_json:
        print_json(
            {
                "base": meta["base"]["name"],
                "tower": meta["tower"],
                "shared": meta["shared"],
                "experts": rows,
                "router": {key: router[key] for key in ("query", "document", "report")},
            }
        )
        return
    from moeret.evaluation.tables import model_tables

    for part in model_tables(meta):
        OUT.print(part, markup=False)


if __name__ == "__main__":
    main()
