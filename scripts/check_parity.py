"""Compares moeret's embeddings with sentence-transformers' on the same models and texts.

  python -m scripts.check_parity [--data BEIR_DIR] [--texts N]

It needs an environment with both moeret and sentence-transformers. Compared are the default base with its published
weights, and small random checkpoints of the other shapes in the BERT family: CLS pooling (as BGE), mean pooling without
a Normalize module or any modules.json (as Contriever), prompts (as E5), and LayerNorm's old names under a `bert.` prefix.
Expected: a largest absolute difference below 1e-5 everywhere, else it exits with 1. Two minutes on two cores.
"""

import argparse
import importlib.util
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

import moeret
from moeret.config import DEFAULT_BASE
from moeret.data.beir import read_corpus, read_queries
from moeret.models.pretrained import find_base
from scripts.benchmarks import markdown_table, write_section
from scripts.record_reference import TEXTS

TOLERANCE = 1e-5
TEXT = """the a of and with under over never often river engine contract patient loop query ledger window salary market
court dose array branch kernel account tenant nurse shell file price bond café naïve straße 12 3.5 1999 x86 don't e-mail
(see note) a=b; C++ 50% → 東京 город مدينة עיר 👍"""
Write = Callable[[Path, Path], None]


def generated_texts(count: int) -> list[str]:
    """Sentences of pseudo-random words, from 1 to about 400 words long; the same on every machine."""
    draw, words = random.Random(0), TEXT.split()
    lengths = [max(1, round(400 ** draw.random())) for _ in range(count)]
    return [" ".join(draw.choices(words, k=length)).capitalize() + draw.choice(("", ".", "?")) for length in lengths]


def beir_texts(folder: Path, count: int) -> list[str]:
    """Texts of a BEIR folder: a third of them queries, the rest documents, drawn at random."""
    queries = list(read_queries(folder / "queries.jsonl").values())
    documents = [document.contents for document in read_corpus(folder / "corpus.jsonl")]
    draw = random.Random(0)
    chosen = draw.sample(queries, min(count // 3, len(queries)))
    return chosen + draw.sample(documents, min(count - len(chosen), len(documents)))


def write_bert(folder: Path, tokenizer: Path, *, seed: int, **shape: object) -> None:
    """A random BERT as transformers saves one, with the default base's tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(seed)
    words = AutoTokenizer.from_pretrained(tokenizer)
    words.save_pretrained(folder)
    # Weights much larger than BERT's own initial ones, so that different texts get very different vectors.
    BertModel(BertConfig(vocab_size=len(words), initializer_range=0.15, **shape)).save_pretrained(folder)


def write_pipeline(folder: Path, *, pooling: str, normalize: bool) -> None:
    """The files that tell sentence-transformers how to pool, as its older versions wrote them."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": n, "name": str(n), "path": paths[kind], "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for kind in kinds[1:]:
        (folder / paths[kind]).mkdir()
    modes = {f"pooling_mode_{mode}": mode.startswith(pooling) for mode in ("cls_token", "mean_tokens", "max_tokens")}
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": width, **modes}))


def write_bge_like(folder: Path, tokenizer: Path) -> None:
    """CLS pooling, normalised; a narrow and deep model."""
    write_bert(
        folder, tokenizer, seed=1, hidden_size=48, num_hidden_layers=5, num_attention_heads=4, intermediate_size=96
    )
    write_pipeline(folder, pooling="cls", normalize=True)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 512, "do_lower_case": True}))


def write_contriever_like(folder: Path, tokenizer: Path) -> None:
    """Mean pooling by default, not normalised, cut at the model's 160 positions."""
    write_bert(
        folder, tokenizer, seed=2, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=160, hidden_act="gelu_new",
    )  # fmt: skip


def write_e5_like(folder: Path, tokenizer: Path) -> None:
    """Mean pooling, normalised, with a prompt for each side."""
    write_bert(
        folder, tokenizer, seed=3, hidden_size=36, num_hidden_layers=3, num_attention_heads=6, intermediate_size=72,
        hidden_act="relu",
    )  # fmt: skip
    write_pipeline(folder, pooling="mean", normalize=True)
    prompts = {"prompts": {"query": "query: ", "document": "passage: "}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))


def write_old_names(folder: Path, tokenizer: Path) -> None:
    """The E5-like model with tensors named as in the first checkpoints of BERT."""
    from safetensors.torch import load_file, save_file

    write_e5_like(folder, tokenizer)
    tensors = load_file(folder / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in tensors.items():
        stem, dot, leaf = name.rpartition("LayerNorm")
        renamed[f"bert.{stem}{old[dot + leaf]}" if dot else f"bert.{name}"] = tensor
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


RANDOM_MODELS: dict[str, Write] = {
    "random, CLS pooling, Normalize (as BGE)": write_bge_like,
    "random, no modules.json (as Contriever)": write_contriever_like,
    "random, mean pooling, prompts (as E5)": write_e5_like,
    "random, `bert.` prefix, gamma and beta": write_old_names,
}


def largest_difference(folder: Path, texts: Sequence[str]) -> float:
    """The largest absolute difference of any component of any text, as query and as document."""
    import torch
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    ours = moeret.Model.load(folder)
    sides = {theirs.encode_query: ours.encode_query, theirs.encode_document: ours.encode_document}
    if not any(ours.base.prompts.values()):
        sides.pop(theirs.encode_document)  # both sides are the same
    return max(
        float(np.abs(their_side(list(texts), batch_size=16) - our_side(texts)).max())
        for their_side, our_side in sides.items()
    )


def main() -> None:
    """Compares, writes the section `parity` of BENCHMARKS.md, and exits with 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="BEIR folder whose texts are compared too")
    parser.add_argument("--texts", type=int, default=400, help="how many texts are generated, and taken from --data")
    arguments = parser.parse_args()
    if importlib.util.find_spec("sentence_transformers") is None:
        sys.exit("sentence-transformers is not installed here; this needs an environment with both libraries")
    texts = [*TEXTS, *generated_texts(arguments.texts)]
    if arguments.data:
        texts += beir_texts(arguments.data, arguments.texts)
    published = find_base(DEFAULT_BASE)
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for name, write in {f"{DEFAULT_BASE}, as published": None, **RANDOM_MODELS}.items():
            folder = Path(root) / "model" if write else published
            if write:
                folder.mkdir()
                write(folder, published)
            rows.append((name, largest_difference(folder, texts)))
            print(f"{name}: largest absolute difference {rows[-1][1]:.1e}", flush=True)
            if write:
                shutil.rmtree(folder)
    table = markdown_table(["model", "largest absolute difference"], [[name, f"{gap:.1e}"] for name, gap in rows])
    origin = (
        f", {len(texts) - len(TEXTS) - arguments.texts} of them from {arguments.data.name}" if arguments.data else ""
    )
    body = f"Over all components of the embeddings of {len(texts)} texts{origin}, at most {TOLERANCE:.0e} allowed.\n\n{table}"
    others = ("sentence-transformers", "transformers", "torch")
    write_section("parity", "Parity with sentence-transformers", body, {name: version(name) for name in others})
    if any(not gap <= TOLERANCE for _, gap in rows):
        sys.exit(f"an embedding differs by more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
