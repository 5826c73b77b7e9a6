"""The commands that share models on the Hugging Face hub."""

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from moeret.config import require
from moeret.terminal import OUT, print_json

Named = tyro.conf.UseAppendAction[list[tuple[str, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """Upload a model to the Hugging Face hub, with a model card made from what the model says of itself.

    Needs a token that may write: `hf auth login`, or HF_TOKEN. Checkpoints (the folder training) stay here.

    Example: moeret push model somebody/legal-experts --private --license apache-2.0 --data-license law=cc-by-4.0
    """

    model: tyro.conf.Positional[Path]
    """Model directory."""
    repo_id: tyro.conf.Positional[str]
    """OWNER/NAME on the hub; made if it is not there."""
    private: bool = False
    """Let nobody else see it."""
    license: str | None = None
    """The model's licence, as the hub names it (apache-2.0)."""
    data_license: Named = field(default_factory=list)
    """NAME=LICENSE of an expert's data, for the card; unknown unless given."""
    data_source: Named = field(default_factory=list)
    """NAME=TEXT: where an expert's data are from, for the card; unknown unless given."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        from moeret.models.sharing import push_model

        url = push_model(
            self.model,
            self.repo_id,
            private=self.private,
            license=self.license,
            data_licenses=_named("--data-license", self.data_license),
            data_sources=_named("--data-source", self.data_source),
            show_progress_bar=not self.json,
        )
        if self.json:
            print_json({"repo_id": self.repo_id, "commit": url})
        else:
            OUT.print(url, markup=False, soft_wrap=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """Download a model from the Hugging Face hub, and check every file of it.

    Interrupted, the same command goes on; MODEL is there only once all of it is.

    Example: moeret pull somebody/legal-experts --out model
    """

    repo_id: tyro.conf.Positional[str]
    """OWNER/NAME on the hub."""
    out: Path
    """Model directory to make."""
    revision: str | None = None
    """Branch, tag or commit; the newest unless given."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        from moeret.models.sharing import pull_model

        published = pull_model(self.repo_id, self.out, revision=self.revision, show_progress_bar=not self.json)
        names = [entry["name"] for entry in published.meta["experts"]]
        if self.json:
            print_json({"repo_id": self.repo_id, "out": str(self.out), "experts": names})
        else:
            OUT.print(f"Model: {self.out}, experts {', '.join(names)}", markup=False)


def _named(flag: str, groups: list[tuple[str, ...]]) -> dict[str, str]:
    """NAME=TEXT items by name."""
    named: dict[str, str] = {}
    for item in (item for group in groups for item in group):
        name, equals, text = item.partition("=")
        require(bool(name and equals and text.strip()), f"{flag} wants NAME=TEXT, got {item!r}")
        require(name not in named, f"{flag} is given twice for {name}")
        named[name] = text
    return named
