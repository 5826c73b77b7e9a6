"""moeret: mixture-of-experts routed retrieval.

Domain experts on one frozen encoder, a router that picks them by the query, an HNSW index per expert, one ranked list.
Names are loaded when first used, so that searching does not import training code.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "ArtifactError": "errors",
    "BaseEncoderError": "errors",
    "BusyError": "errors",
    "CheckpointError": "errors",
    "Columns": "data.convert",
    "ConfigError": "errors",
    "DataError": "errors",
    "Document": "types",
    "ExpertConfig": "config",
    "Hit": "types",
    "HubError": "errors",
    "IndexConfig": "config",
    "Model": "models.model",
    "MoeretError": "errors",
    "Retriever": "retrieval.search",
    "Route": "types",
    "TrainConfig": "config",
    "add_expert": "training.run",
    "build_index": "retrieval.build",
    "compact_index": "retrieval.update",
    "convert_dataset": "data.convert",
    "convert_rows": "data.convert",
    "estimate_index": "retrieval.estimate",
    "evaluate": "evaluation.benchmark",
    "export_expert": "models.portable",
    "export_index": "retrieval.export",
    "pull_model": "models.sharing",
    "push_model": "models.sharing",
    "remove_expert": "training.run",
    "rollback_index": "retrieval.update",
    "score_run": "evaluation.benchmark",
    "train": "training.run",
    "update_index": "retrieval.update",
    "verify_index": "retrieval.verify",
}
__all__ = [
    "ArtifactError",
    "BaseEncoderError",
    "BusyError",
    "CheckpointError",
    "Columns",
    "ConfigError",
    "DataError",
    "Document",
    "ExpertConfig",
    "Hit",
    "HubError",
    "IndexConfig",
    "Model",
    "MoeretError",
    "Retriever",
    "Route",
    "TrainConfig",
    "add_expert",
    "build_index",
    "compact_index",
    "convert_dataset",
    "convert_rows",
    "estimate_index",
    "evaluate",
    "export_expert",
    "export_index",
    "pull_model",
    "push_model",
    "remove_expert",
    "rollback_index",
    "score_run",
    "train",
    "update_index",
    "verify_index",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moeret' has no attribute {name!r}")
    return getattr(import_module(f"moeret.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
