"""Encoding speed against sentence-transformers: the same texts, the same model, interleaved in one run.

  python -m scripts.bench_encode --data DATA [--texts N] [--repeats R]

DATA is a folder of BEIR folders. It needs an environment with both moeret and sentence-transformers; its ONNX backend takes
part where optimum-onnx is installed, bfloat16 where the processor or an accelerator multiplies it. Each system is warmed up on all
texts first. About twenty minutes on two slow cores. Writes a section of BENCHMARKS.md and docs/encode.svg.
"""

import argparse
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

import moeret
from moeret.config import DEFAULT_BASE, ExpertConfig
from moeret.data.beir import read_corpus
from moeret.models.embed import Embedder
from moeret.models.experts import base_alone
from moeret.models.pretrained import find_base
from scripts.benchmarks import FILE, fast_precision, interleaved_seconds, markdown_table, write_section

Encode = Callable[[Sequence[str]], np.ndarray]
OURS, THEIRS = "moeret", "sentence-transformers"
LENGTHS = (16, 32, 64, 128, 256)
BOUNDS = {"mixed lengths": (4.0, 1.7), "one length": (1.5, None)}
"""Expected of us: times the peer as installed, and times its fastest setting."""


def systems() -> dict[str, Encode]:
    """What is compared, by name."""
    import torch
    from sentence_transformers import SentenceTransformer

    folder = str(find_base(DEFAULT_BASE))
    base = moeret.Model.load(DEFAULT_BASE).base
    embedder = Embedder(base, base_alone(base.config, ExpertConfig()))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Encode] = {f"{THEIRS}, float32": SentenceTransformer(folder, device=device).encode}
    precisions = ["float32"]
    if fast_precision() == "bfloat16":
        precisions.append("bfloat16")
        found[f"{THEIRS}, bfloat16"] = SentenceTransformer(
            folder, device=device, model_kwargs={"dtype": torch.bfloat16}
        ).encode
    if _installed("optimum-onnx") and device == "cpu":
        found[f"{THEIRS}, ONNX"] = SentenceTransformer(folder, backend="onnx", model_kwargs={"export": True}).encode
    for precision in precisions:
        found[f"{OURS}, {precision}"] = embedder.in_precision(precision).base
    return found


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def texts_of(data: Path, count: int) -> tuple[list[str], list[int]]:
    """Documents of every corpus, as many of each, and their lengths in tokens."""
    random, texts = np.random.default_rng(0), []
    folders = sorted(path.parent for path in data.glob("*/corpus.jsonl"))
    for folder in folders:
        corpus = [document.contents for document in read_corpus(folder / "corpus.jsonl")]
        rows = random.choice(len(corpus), min(len(corpus), 40 * count // len(folders)), replace=False)
        texts += [corpus[row] for row in rows]
    random.shuffle(texts)
    return texts, [len(ids) for ids in moeret.Model.load(DEFAULT_BASE).base.tokenizer(texts)]


def seconds_of(encoders: dict[str, Encode], texts: Sequence[str], repeats: int) -> dict[str, float]:
    """Median seconds of each for these texts."""
    return interleaved_seconds({name: lambda run=encode: run(texts) for name, encode in encoders.items()}, repeats)


def least_cosine(encoders: dict[str, Encode], texts: Sequence[str]) -> dict[str, float]:
    """The least cosine of any text to the peer's float32 vector of it."""
    exact = encoders[f"{THEIRS}, float32"](texts)
    return {name: float((np.asarray(encode(texts)) * exact).sum(axis=1).min()) for name, encode in encoders.items()}


def main() -> None:
    """Runs the benchmark and writes its section."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of BEIR folders")
    parser.add_argument("--texts", type=int, default=600, help="how many texts are encoded at a time")
    parser.add_argument("--repeats", type=int, default=5, help="how often each is timed")
    arguments = parser.parse_args()
    encoders = systems()
    texts, lengths = texts_of(arguments.data, arguments.texts)
    of_length = {
        most: [text for text, length in zip(texts, lengths, strict=True) if 0.9 * most <= length <= most]
        for most in LENGTHS
    }
    sets = {"mixed lengths": texts[: arguments.texts], "one length": of_length[128][: arguments.texts]}
    cosines = least_cosine(encoders, sets["mixed lengths"])
    body, curves = [], {}
    for name, own in sets.items():
        seconds = seconds_of(encoders, own, arguments.repeats)
        body += [_table(name, own, seconds, cosines), _verdicts(name, seconds)]
    for most, own in of_length.items():
        some = own[: arguments.texts // 4]
        seconds = seconds_of(encoders, some, arguments.repeats)
        curves[most] = {name: len(some) / taken for name, taken in seconds.items()}
    columns = ["texts/s by length", *(f"{most}" for most in curves)]
    rows = [[name, *(f"{rates[name]:.0f}" for rates in curves.values())] for name in encoders]
    body += ["Texts a second by their length (within a tenth below it):", markdown_table(columns, rows)]
    body.append("![Texts a second against length](docs/encode.svg)")
    _plot(curves)
    print("\n\n".join(body))
    extra = {name: version(name) for name in (THEIRS, "transformers", "torch")}
    write_section("encode", "Encoding", "\n\n".join(body), extra)


def _table(name: str, texts: Sequence[str], seconds: dict[str, float], cosines: dict[str, float]) -> str:
    installed = seconds[f"{THEIRS}, float32"]
    rows = [
        [system, f"{len(texts) / own:.0f}", f"{installed / own:.2f}", f"{cosines[system]:.6f}"]
        for system, own in seconds.items()
    ]
    table = markdown_table(["system", "texts/s", "times the peer as installed", "least cosine to it"], rows)
    return f"{len(texts)} documents of {name}:\n\n{table}"


def _verdicts(name: str, seconds: dict[str, float]) -> str:
    """Whether our fastest setting is as much faster as expected."""
    ours = min(own for system, own in seconds.items() if system.startswith(OURS))
    installed = seconds[f"{THEIRS}, float32"]
    fastest = min(own for system, own in seconds.items() if system.startswith(THEIRS))
    pairs = zip(("as installed", "at its fastest"), (installed, fastest), BOUNDS[name], strict=True)
    lines = [
        f"- {name}: {theirs / ours:.2f} times the peer {what} ({'holds' if theirs / ours >= bound else '**fails**'}: "
        f"at least {bound})"
        for what, theirs, bound in pairs
        if bound is not None
    ]
    return "\n".join(lines)


def _plot(curves: dict[int, dict[str, float]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "moeret"
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name in next(iter(curves.values())):
        style = "o-" if name.startswith(OURS) else "s--"
        axes.plot([*curves], [rates[name] for rates in curves.values()], style, label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens a text", ylabel="texts a second")
    axes.set_xticks([*curves], [*map(str, curves)])
    axes.minorticks_off()
    axes.legend(frameon=False)
    figure.savefig(FILE.parent / "docs" / "encode.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
