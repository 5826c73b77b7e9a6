"""The command that serves an index."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from moeret.cli.arguments import Flat
from moeret.config import Precision, ServeConfig
from moeret.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    """Serve an index over HTTP, with a page to search it at /, and what programs can ask at /docs.

    A key in the environment variable MOERET_KEY must be sent with every request.
    """

    index: tyro.conf.Positional[Path]
    """Index directory."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of this machine's."""
    port: int = 8000
    """Port to listen on."""
    precision: Precision = "float32"
    """Of the products that embed queries; bfloat16 is faster where the processor multiplies it."""
    hybrid: bool = True
    """Whether words (BM25) and memories count beside the cosine, as training chose for each expert."""
    config: Annotated[ServeConfig, Flat] = field(default_factory=ServeConfig)

    def run(self) -> None:
        try:
            from moeret.serving.server import serve
        except ImportError as error:
            raise ConfigError(f"serving needs more libraries ({error}); run pip install 'moeret[serve]'") from None
        key = os.environ.get("MOERET_KEY")
        options = {"key": key, "precision": self.precision, "hybrid": self.hybrid}
        serve(self.index, self.host, self.port, config=self.config, **options)
