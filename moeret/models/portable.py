"""One expert for those who embed with something else: merged with its base for sentence-transformers, or as a PEFT adapter."""

import json
import re
import shutil
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from safetensors.numpy import save_file

from moeret.config import require
from moeret.models.model import Model
from moeret.models.pretrained import matrix_name, write_base
from moeret.types import BASE_EXPERT

Format = Literal["sentence-transformers", "peft"]


def export_expert(
    model: str | Path | Model, expert: str, out: str | Path, to: Format = "sentence-transformers"
) -> Path:
    """Writes one expert, with its part of the shared delta, into a new folder, and returns that.

    sentence-transformers: the base with the expert's deltas added to its matrices; `SentenceTransformer(folder)` gives the
    embeddings of `encode_query(expert=...)`, and of `encode_document` if the model has two towers. peft: a LoRA adapter, for
    `PeftModel.from_pretrained(base, folder)`, whose rank is the expert's and the shared delta's together.

    Raises:
      ArtifactError: the model is damaged.
      ConfigError: there is no such expert or format, or `out` is there already.
    """
    model, out = model if isinstance(model, Model) else Model.load(model), Path(out)
    require(to in get_args(Format), f"to must be {' or '.join(get_args(Format))}, got {to!r}")
    number = model.number(expert)
    require(expert != BASE_EXPERT, f"{BASE_EXPERT} is the base itself; name one of {', '.join(model.experts)}")
    require(not out.exists(), f"{out} is there already; name a folder that is not")
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    if to == "sentence-transformers":
        write_base(model.embedder.alone(number).base_encoder, unfinished)
    else:
        _write_adapter(model, number, unfinished)
    unfinished.rename(out)
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
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(adapter, indent=1) + "\n")
