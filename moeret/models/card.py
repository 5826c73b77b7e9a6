"""A model's card: what people on the hub read of it, all of it from the model's own manifest and its maker's words."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moeret.artifact import Artifact
from moeret.models.model import read_profile

MADE = "made.json"
"""Beside a model's manifest, which it is no part of: how long what took, on which device, with which versions."""


def read_made(model: Path) -> dict[str, dict[str, Any]]:
    """The runs that made a model, by what they did: request, whether finished, hours, device, versions. Empty if none is noted."""
    try:
        made = json.loads((model / MADE).read_text())
        return {
            str(what): {
                "request": str(own["request"]),
                "finished": bool(own.get("finished", True)),
                "hours": float(own["hours"]),
                "device": str(own["device"]),
                "versions": {str(name): str(number) for name, number in own["versions"].items()},
            }
            for what, own in made.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def model_card(
    published: Artifact,
    repo_id: str,
    base: str | None,
    *,
    license: str | None,  # noqa: A002 (what the hub calls it)
    licenses: Mapping[str, str],
    sources: Mapping[str, str],
) -> str:
    """The text of README.md; `base` is the base's name on the hub, where it has one, and what is not known says so."""
    meta = published.meta
    head = {
        "library_name": "moeret",
        **({"base_model": base} if base else {}),
        "pipeline_tag": "sentence-similarity",
        "tags": ["moeret", "feature-extraction", "retrieval", "mixture-of-experts", "lora", "jax"],
        **({"license": license} if license else {}),
    }
    names = [entry["name"] for entry in meta["experts"]]
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in head.items()),
            "---",
            "",
            f"# {repo_id.rpartition('/')[2]}",
            "",
            f"Domain experts ({', '.join(names)}) on one frozen text encoder, and a router that picks them by the query, made with",
            f"moeret. Base: {base or 'an encoder that the hub is not known to have'} (its files are in `base`, fingerprint",
            f"`{meta['base']['fingerprint'][:12]}`). Tower: {_TOWERS[meta['tower']]}.",
            "",
            "## Use",
            "",
            "```sh",
            f"moeret pull {repo_id} --out model",
            f"moeret index model --domain {names[0]}=data/{names[0]} --out index",
            "```",
            "",
            "```python",
            "import moeret",
            "",
            'model = moeret.Model.load("model")',
            f'queries = model.encode_query(["a query"], expert="auto")  # or "{names[0]}"',
            'documents = model.encode_document(["a document"])',
            "```",
            "",
            "## Data",
            "",
            *_table(
                ("domain", "documents", "train queries", "dev queries", "source", "licence"),
                (
                    (
                        entry["name"],
                        f"{entry['documents']:,}",
                        f"{entry['train_queries']:,}",
                        f"{len(read_profile(published, entry['profile']).dev_queries):,}",
                        sources.get(entry["name"], "unknown"),
                        licenses.get(entry["name"], "unknown"),
                    )
                    for entry in meta["experts"]
                ),
            ),
            "",
            "The model holds vectors of these queries and of a sample of the documents, not their texts.",
            *_made_up(meta),
            "",
            "## Quality on dev",
            "",
            "nDCG@10 of each domain's dev queries. Strengths, blends and the router were chosen on them: what you may expect",
            "elsewhere is measured by `moeret evaluate` on queries that nothing was chosen on.",
            "",
            *_quality(meta),
            "",
            "## Training",
            "",
            *_training(published),
            "",
        ]
    )


_TOWERS = {
    "query": "query (experts change queries; documents are embedded by the base)",
    "both": "both (experts embed queries and documents)",
}


def _made_up(meta: Mapping[str, Any]) -> list[str]:
    own = [entry["name"] for entry in meta["experts"] if "queries.jsonl" not in _sources(entry)]
    return [f"Queries of {', '.join(own)} were made from the documents; nobody judged them."] if own else []


def _sources(entry: Mapping[str, Any]) -> Mapping[str, str]:
    return entry["request"][f"domain {entry['name']}"]


def _quality(meta: Mapping[str, Any]) -> list[str]:
    rows = []
    for entry in meta["experts"]:
        before, after, own = entry["base_dev_ndcg"], entry["dev_ndcg"], entry["own_index_dev_ndcg"]
        rows.append(
            (
                entry["name"] + (" (a PEFT adapter)" if "adapter" in entry["request"] else ""),
                *(_gain(before[group], after[group]) for group in ("all", "seen", "unseen")),
                f"{own['blend']:.3f}" if own else "-",
                f"{entry['strength']:g}",
                f"{entry['shared_strength']:g}",
            )
        )
    head = (
        "expert", "base → expert", "documents seen in training", "unseen", "own index, with words and memory", "strength",
        "of the shared delta",
    )  # fmt: skip
    return _table(head, rows)


def _training(published: Artifact) -> list[str]:
    made, meta = read_made(published.root), published.meta
    names = {"train", *(f"add {entry['name']}" for entry in meta["experts"])}
    runs = [
        (
            what,
            f"{own['hours']:.2f}",
            own["device"],
            ", ".join(f"{name} {number}" for name, number in own["versions"].items()),
        )
        for what, own in made.items()
        if what in names
    ]
    table = _table(("run", "hours", "device", "versions"), runs) if runs else ["Hours and device: unknown."]
    settings = {key: own for key, own in meta["request"].items() if key != "base" and not key.startswith("domain ")}
    return [
        *table,
        "",
        "Hours are of wall clock, at least (those of a process that was killed are not counted). Carbon was not measured: it is",
        "these hours times the device's power times what your electricity emits.",
        "",
        "```json",
        json.dumps(settings),
        "```",
    ]


def _gain(before: float | None, after: float | None) -> str:
    return "too few queries" if before is None or after is None else f"{before:.3f} → {after:.3f}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = [*head]
    lines = [head, ["---"] * len(head), *([*map(_cell, row)] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _cell(text: str) -> str:
    """One line of a table's cell, whatever somebody wrote."""
    return re.sub(r"([|<>`\\])", r"\\\1", " ".join(text.split()))
