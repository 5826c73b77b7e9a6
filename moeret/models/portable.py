"""Experts from and for other libraries: one merged with its base for sentence-transformers, PEFT adapters in and out."""

import json
import re
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moeret import artifact
from moeret.config import MATRICES, ExpertConfig, require
from moeret.errors import ConfigError
from moeret.lock import new_folder
from moeret.models.encoder import matrix_shapes
from moeret.models.experts import Bank, layer_name
from moeret.models.model import Model
from moeret.models.pretrained import Base, matrix_name, write_base
from moeret.types import BASE_EXPERT

Format = Literal["sentence-transformers", "peft"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""How factors may have begun: PEFT's other ways (PiSSA, OLoRA, ...) change the base's own matrices too."""
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
"""What adapter_config.json may say: what is read here, and what says how factors were trained, not what they do."""


def export_expert(
    model: str | Path | Model, expert: str, out: str | Path, to: Format = "sentence-transformers"
) -> Path:
    """Writes one expert, with its part of the shared delta, into a new folder, and returns that.

    sentence-transformers: the base with the expert's deltas added to its matrices; `SentenceTransformer(folder)` gives the
    embeddings of `encode_query(expert=...)`, and of `encode_document` if the model has two towers. peft: a LoRA adapter, for
    `PeftModel.from_pretrained(base, folder)`, whose rank is the expert's and the shared delta's together.

    Raises:
      ArtifactError: the model is damaged.
      ConfigError: there is no such expert or format, or `out` is there already. BusyError: it is being made.
    """
    model, out = model if isinstance(model, Model) else Model.load(model), Path(out)
    require(to in get_args(Format), f"to must be {' or '.join(get_args(Format))}, got {to!r}")
    number = model.number(expert)
    require(expert != BASE_EXPERT, f"{BASE_EXPERT} is the base itself; name one of {', '.join(model.experts)}")
    with new_folder(out) as folder:
        if to == "sentence-transformers":
            write_base(model.embedder.alone(number).base_encoder, folder)
        else:
            _write_adapter(model, number, folder)
    return out


def _write_adapter(model: Model, expert: int, out: Path) -> None:
    tensors, ranks, modules = {}, set(), []
    for layer, matrices in model.embedder.delta(expert).items():
        for matrix, factors in matrices.items():
            module = matrix_name(int(layer.removeprefix("layer_")), matrix)
            modules.append(module)
            ranks.add(factors["a"].shape[1])
            # BERT's matrices are stored transposed, and so are a delta's factors.
            tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(np.asarray(factors["a"]).T)
            tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(np.asarray(factors["b"]).T)
    [rank] = ranks
    adapter = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": model.base.name,
        "r": rank,
        "lora_alpha": rank,  # what it divides by: the factors need no scale
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": f"(.*\\.)?({'|'.join(re.escape(module) for module in modules)})",
    }
    save_file(tensors, out / _WEIGHTS, {"format": "pt"})
    (out / _CONFIG).write_text(json.dumps(adapter, indent=1) + "\n")


def adapter_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that `read_adapter` reads."""
    return {name: artifact.sha256_of(folder / name) for name in (_CONFIG, _WEIGHTS)}


def read_adapter(folder: Path, base: Base, shape: ExpertConfig) -> Bank:
    """A PEFT LoRA adapter as one expert's delta (no leading axis), padded with zeros to the experts' `shape`.

    The delta is the whole adapter's: what the shape has no place for is refused, never left out. Only factors of
    the pooler, which no embedding reads, are passed over.

    Raises:
      ConfigError: no such adapter, more than LoRA factors in it, it is of another base, or it does not fit the shape.
    """
    for name in (_CONFIG, _WEIGHTS):
        require(
            (folder / name).is_file(),
            f"{folder} is no PEFT adapter: it has no {name}; "
            "`save_pretrained` of PEFT or of sentence-transformers writes one (moeret reads weights from safetensors only)",
        )
    settings = _read_settings(folder / _CONFIG, base)
    places = {matrix_name(layer, matrix): (layer, matrix) for layer in range(base.config.layers) for matrix in MATRICES}
    factors: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    scales: dict[tuple[int, str], float] = {}
    for name, array in _read_tensors(folder / _WEIGHTS).items():
        found = _FACTOR.fullmatch(name)
        module = found and found["module"]
        own = module and re.sub(r"^(.*?\.)?(?=encoder\.layer\.|pooler\.)", "", module)
        if own == "pooler.dense":
            continue
        require(own in places, f"{folder / _WEIGHTS}: {name!r} is no LoRA factor of a matrix that {base.name} has")
        pair = factors.setdefault(places[own], {})
        require(found["side"] not in pair, f"{folder / _WEIGHTS} has two adapters of {own}; give one encoder's alone")
        pair[found["side"]] = array
        scales[places[own]] = _scale(folder / _CONFIG, settings, module, array, found["side"])
    require(bool(factors), f"{folder / _WEIGHTS} has no LoRA factors")
    shapes = matrix_shapes(base.config)
    for (layer, matrix), pair in factors.items():
        where, (d_in, d_out) = f"{folder / _WEIGHTS}: {matrix_name(layer, matrix)}", shapes[matrix]
        require(pair.keys() == {"A", "B"}, f"{where} has only one of its two factors; save the adapter anew")
        a, b = pair["A"], pair["B"]
        require(
            a.ndim == b.ndim == 2 and (a.shape[1], b.shape[0]) == (d_in, d_out) and len(a) == b.shape[1],
            f"{where} has factors of shapes {a.shape} and {b.shape}; {base.name} has a matrix of {(d_out, d_in)}: "
            "the adapter is of another base",
        )
        with np.errstate(all="ignore"):
            delta = (b * np.float32(scales[layer, matrix])) @ a
        require(bool(np.isfinite(delta).all()), f"{where} has values that are not finite, or too large to be used")
    _require_fits(folder, factors, base, shape)
    return {
        layer_name(layer): {
            matrix: _padded(factors.get((layer, matrix)), scales.get((layer, matrix), 0.0), shape.rank, shapes[matrix])
            for matrix in shape.matrices
        }
        for layer in range(base.config.layers - shape.layers, base.config.layers)
    }


def _read_settings(path: Path, base: Base) -> dict[str, Any]:
    """adapter_config.json, if it is of a LoRA adapter that is nothing but factors."""
    try:
        settings = json.loads(path.read_text())
        kind, start, name = (settings.get(key) for key in ("peft_type", "init_lora_weights", "base_model_name_or_path"))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"cannot read {path}: {error or 'it is no JSON object'}") from None
    require(kind == "LORA", f"{path}: peft_type {kind!r} is not supported; an expert can be made of LoRA adapters only")
    for key, value in settings.items():
        require(
            key in _HARMLESS or value in (None, False, "none") or value == [] or value == {},
            f"{path}: {key} {value!r} is not supported: an expert is LoRA factors alone; train the adapter without it",
        )
    require(
        start in _STARTS,
        f"{path}: init_lora_weights {start!r} is not supported, because it changes the base's matrices too; "
        "save the adapter converted (PEFT's path_initial_model_for_weight_conversion)",
    )
    hub = re.compile(r"[\w.-]+/[\w.-]+")
    named = all(isinstance(own, str) and hub.fullmatch(own) and not Path(own).exists() for own in (name, base.name))
    require(
        not named or name.rpartition("/")[2].lower() == base.name.rpartition("/")[2].lower(),
        f"{path}: the adapter is of {name}, the model's base is {base.name}; "
        "if both are the same encoder, say so in base_model_name_or_path",
    )
    return settings


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of an adapter, in float32."""
    try:
        with safe_open(path, framework="np") as file:
            names = file.keys()
            with np.errstate(over="ignore"):  # what is not finite is refused later
                return {name: file.get_tensor(name).astype(np.float32, casting="same_kind") for name in names}
    except (SafetensorError, OSError, TypeError, AttributeError) as error:  # the last for types that numpy has not
        raise ConfigError(f"cannot read {path}: {error}") from None


def _scale(path: Path, settings: dict[str, Any], module: str, factor: np.ndarray, side: str) -> float:
    """What PEFT multiplies a module's delta with; patterns match names as it matches them."""

    def setting(name: str, pattern: str) -> float:
        patterns = settings.get(pattern) or {}
        try:
            require(isinstance(patterns, dict), f"{path}: {pattern} is {patterns!r}, no JSON object")
            key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
            value = settings[name] if key is None else patterns[key]
            require(
                isinstance(value, int | float) and 0 < value < 1e9, f"{path}: {name} is {value!r}, no number above 0"
            )
        except (KeyError, TypeError, re.error) as error:
            raise ConfigError(f"{path}: {name} of {module} is not to be told ({error})") from None
        return value

    rank, has = setting("r", "rank_pattern"), factor.shape[0 if side == "A" else -1] if factor.ndim else 0
    require(rank == has, f"{path}: {module} has rank {rank} by this file and {has} by the factors' shapes")
    return setting("lora_alpha", "alpha_pattern") / (rank**0.5 if settings.get("use_rslora") else rank)


def _require_fits(folder: Path, factors: dict[tuple[int, str], Any], base: Base, shape: ExpertConfig) -> None:
    """Raises ConfigError, with the settings that a model would need, unless the experts' shape holds these factors."""
    rank = max(len(pair["A"]) for pair in factors.values())
    layers = base.config.layers - min(layer for layer, _ in factors)
    changed = {matrix for _, matrix in factors}
    needed = {
        "rank": rank if rank > shape.rank else None,
        "layers": layers if layers > shape.layers else None,
        "matrices": None
        if changed <= {*shape.matrices}
        else [own for own in MATRICES if own in changed | {*shape.matrices}],
    }
    lacking = {name: value for name, value in needed.items() if value is not None}
    if lacking:
        flags = (
            f"--expert.{name} {' '.join(value) if isinstance(value, list) else value}"
            for name, value in lacking.items()
        )
        raise ConfigError(
            f"{folder} has rank {rank} and changes {', '.join(sorted(changed))} in the upper {layers} layers; the model's "
            f"experts have rank {shape.rank} and change {', '.join(shape.matrices)} in the upper {shape.layers}; "
            f"a model whose experts it fits is made by `moeret train {' '.join(flags)}`"
        )


def _padded(
    pair: dict[str, np.ndarray] | None, scale: float, rank: int, shape: tuple[int, int]
) -> dict[str, Float[np.ndarray, "_ _"]]:
    """A matrix's factors {"a": [D_in, R], "b": [R, D_out]}; zeros where the adapter leaves the matrix as it is."""
    d_in, d_out = shape
    a, b = np.zeros((d_in, rank), np.float32), np.zeros((rank, d_out), np.float32)
    if pair is not None:
        own = len(pair["A"])
        a[:, :own], b[:own] = pair["A"].T, pair["B"].T * np.float32(scale)
    return {"a": a, "b": b}
