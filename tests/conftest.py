"""A tiny base encoder and tiny domains, made on the spot: the whole suite runs offline on a CPU."""

import dataclasses
import json
import os
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 4)
# Many tests compile the same small programs; kept beside pytest's own cache, for child processes too.
COMPILED = Path(__file__).parent.parent / ".pytest_cache" / "compiled"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED)
jax.config.update("jax_compilation_cache_dir", str(COMPILED))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from safetensors.numpy import save_file  # noqa: E402

import moeret  # noqa: E402
from moeret.models.model import Model  # noqa: E402

WIDTH, LAYERS, HEADS, MLP, POSITIONS = 16, 3, 2, 32, 64
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOPICS = {
    "fruit": ["apple", "pear", "plum", "fig", "lime", "kiwi", "grape", "melon", "mango", "peach", "berry", "date"],
    "metal": [
        "iron",
        "zinc",
        "lead",
        "gold",
        "tin",
        "steel",
        "brass",
        "nickel",
        "cobalt",
        "copper",
        "silver",
        "chrome",
    ],
    "river": ["rhine", "nile", "volga", "tiber", "seine", "elbe", "oder", "tagus", "ebro", "loire", "thames", "douro"],
}
FILLER = ["find", "the", "about", "which", "of", "a", "very", "text", "on", "is", "with", "and", "long", "story"]
NICKNAMES = [f"nick{number}" for number in range(12)]
SPLITS = {"train": range(8), "dev": range(8, 10), "test": range(10, 12)}


QUERIES = [
    "find the metal nick10",
    "which fruit is nick3",
    "nick11 of the fruit",
    "gold and silver",
    "a very long story about the text with apple and pear and plum and iron and zinc on the rhine",
    "kiwi",
]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT as Hugging Face saves one, with a mean-pooling, normalising pipeline."""
    folder = tmp_path_factory.mktemp("base")
    write_base(folder)
    return folder


def write_base(
    folder: Path,
    *,
    prefix: str = "",
    old_names: bool = False,
    pooling: str = "mean",
    seed: int = 0,
    positions: int = POSITIONS,
) -> None:
    """Writes a tiny base encoder; `prefix` and `old_names` make the checkpoint look like other people's."""
    words = [word for topic in TOPICS.values() for word in topic]
    vocabulary = [*SPECIAL, *words, *FILLER, *NICKNAMES, *TOPICS, *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    config = {
        "model_type": "bert", "vocab_size": len(vocabulary), "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "intermediate_size": MLP, "max_position_embeddings": positions,
        "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": "1_Pooling" if kind == "Pooling" else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {f"pooling_mode_{mode}": mode.startswith(pooling) for mode in ("cls_token", "mean_tokens", "max_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": WIDTH, **modes}))
    tensors = base_tensors(len(vocabulary), prefix, old_names, seed, positions)
    save_file(tensors, folder / "model.safetensors")


def base_tensors(
    vocabulary: int, prefix: str, old_names: bool, seed: int, positions: int = POSITIONS
) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names."""
    random = np.random.default_rng(seed)
    tensors = {}

    def matrix(name: str, *shape: int, scale: float = 0.2) -> None:
        tensors[prefix + name] = (scale * random.normal(size=shape)).astype(np.float32)

    def norm(name: str) -> None:
        scale, bias = ("gamma", "beta") if old_names else ("weight", "bias")
        tensors[f"{prefix}{name}.{scale}"] = np.ones(WIDTH, np.float32)
        matrix(f"{name}.{bias}", WIDTH, scale=0.01)

    matrix("embeddings.word_embeddings.weight", vocabulary, WIDTH, scale=1.0)
    matrix("embeddings.position_embeddings.weight", positions, WIDTH, scale=0.1)
    matrix("embeddings.token_type_embeddings.weight", 2, WIDTH, scale=0.1)
    norm("embeddings.LayerNorm")
    for layer in range(LAYERS):
        stem = f"encoder.layer.{layer}"
        places = {f"attention.self.{name}": (WIDTH, WIDTH) for name in ("query", "key", "value")}
        places |= {
            "attention.output.dense": (WIDTH, WIDTH),
            "intermediate.dense": (MLP, WIDTH),
            "output.dense": (WIDTH, MLP),
        }
        for place, shape in places.items():
            matrix(f"{stem}.{place}.weight", *shape)
            matrix(f"{stem}.{place}.bias", shape[0], scale=0.01)
        norm(f"{stem}.attention.output.LayerNorm")
        norm(f"{stem}.output.LayerNorm")
    return tensors


def write_domain(folder: Path, topic: str) -> Path:
    """Documents about one word each; a query asks by nickname, so that only an expert can learn what it means."""
    words = TOPICS[topic]
    corpus = [
        {
            "_id": f"d{n}",
            "title": word,
            "text": f"a very long story of the {topic} {word} {word}" + " and text" * (n % 5),
        }
        for n, word in enumerate(words)
    ]
    queries, qrels = [], {split: [] for split in SPLITS}
    for split, numbers in SPLITS.items():
        for number in numbers:
            for copy, form in enumerate(("find the {0} {1}", "which {0} is {1}", "{1} {0} of the")):
                # Train asks for every document in one form; dev and test ask for their own in all forms.
                id = f"{split}{number}-{copy}"
                queries.append({"_id": id, "text": form.format(topic, NICKNAMES[number])})
                qrels[split].append(f"{id}\td{number}\t1")
    for number in range(8, 12):
        queries.append({"_id": f"seen{number}", "text": f"about {topic} {NICKNAMES[number]}"})
        qrels["train"].append(f"seen{number}\td{number}\t1")
    write_jsonl(folder / "corpus.jsonl", corpus)
    write_jsonl(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir(exist_ok=True)
    for split, lines in qrels.items():
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def domains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three tiny BEIR folders."""
    root = tmp_path_factory.mktemp("domains")
    return {topic: write_domain(root / topic, topic) for topic in TOPICS}


@pytest.fixture(scope="session")
def train_config() -> moeret.TrainConfig:
    """A few seconds of training."""
    return moeret.TrainConfig(
        steps=150,
        epochs=1000,
        batch_size=16,
        learning_rate=0.02,
        shared_learning_rate=0.02,
        evaluate_every=20,
        patience=10,
        temperature=0.05,
        shared_steps=20,
        expert=moeret.ExpertConfig(rank=8, layers=2, shared_rank=4),
    )


@pytest.fixture(scope="session")
def two_domains(domains: dict[str, Path]) -> dict[str, Path]:
    """The domains that the shared model is trained on."""
    return {name: domains[name] for name in ("fruit", "metal")}


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, two_domains: dict[str, Path], base_folder: Path, train_config
) -> Path:
    """A trained query-tower model of two experts; copy it before changing it."""
    out = tmp_path_factory.mktemp("model") / "model"
    moeret.train(two_domains, out, base=str(base_folder), config=train_config)
    return out


@pytest.fixture(scope="session")
def index_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, two_domains: dict[str, Path]) -> Path:
    """An index of both domains; copy it before changing it."""
    out = tmp_path_factory.mktemp("index") / "index"
    moeret.build_index(model_folder, out, two_domains)
    return out


@pytest.fixture(scope="session")
def both(tmp_path_factory, base_folder, two_domains):
    """An index whose experts encoded their own documents."""
    out = tmp_path_factory.mktemp("both")
    config = moeret.TrainConfig(
        tower="both", steps=6, batch_size=8, evaluate_every=3, expert=moeret.ExpertConfig(rank=4, layers=2)
    )
    moeret.train(two_domains, out / "model", base=str(base_folder), config=config)
    moeret.build_index(out / "model", out / "index", two_domains)
    loaded = moeret.Retriever.load(out / "index")
    yield loaded
    loaded.close()


def assert_ranked(hits):
    assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
    assert all(before.score >= after.score for before, after in pairwise(hits))
    assert len({(hit.expert, hit.id) for hit in hits}) == len(hits)


def place_by_router(monkeypatch, limit: float, **changes) -> None:
    """Makes every document (-1) or none (above 1) familiar to the document router."""
    load = Model.from_artifact

    def altered(published):
        model = load(published)
        familiarity = dataclasses.replace(model.document_router.familiarity, limit=limit)
        model.document_router = dataclasses.replace(model.document_router, familiarity=familiarity, **changes)
        return model

    monkeypatch.setattr(Model, "from_artifact", altered)
