"""One expert, or the router, behind the calls that sentence-transformers has, for who only wants embeddings. Needs no extra."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from moeret.config import require
from moeret.models.model import Model


class SentenceEncoder:
    """Embeds texts as SentenceTransformer does: a text gives a vector [D], a list of texts a matrix [N, D], float32.

    Queries are embedded by `expert` (`auto`: the router decides for each), documents as the model's documents are: by the base
    where they are all in its space, else by `expert` too, which must be named then. Batches are made by length: a `batch_size` is
    taken and not needed.

    Raises:
      ArtifactError: the model is damaged.
      ConfigError: there is no such expert.
    """

    def __init__(self, model: str | Path | Model, expert: str = "auto"):
        self.model = model if isinstance(model, Model) else Model.load(model)
        self._expert = None if expert == "auto" and not self.model.experts else expert
        if self._expert not in (None, "auto"):
            self.model.number(expert)

    @property
    def prompts(self) -> dict[str, str]:
        """What stands before queries and documents."""
        return dict(self.model.base.prompts)

    def encode(
        self,
        sentences: str | Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        **options: Any,
    ) -> Float[np.ndarray, "..."]:
        """Texts that are neither queries nor documents, embedded as queries, with no prompt unless one is given or named.

        Raises:
          ConfigError: there is no such prompt, or something is not a string.
        """
        require(
            prompt_name is None or prompt_name in self.prompts,
            f"there is no prompt {prompt_name!r}; there are {', '.join(self.prompts) or 'none'}",
        )
        own = self.prompts[prompt_name] if prompt is None and prompt_name else prompt
        return self.encode_query(sentences, prompt=own or "", **options)

    def encode_query(self, sentences: str | Sequence[str], **options: Any) -> Float[np.ndarray, "..."]:
        """Queries; the options are Model.encode_query's, and `batch_size` and `convert_to_numpy`."""
        return self._encoded(self.model.encode_query, sentences, self._expert, options)

    def encode_document(self, sentences: str | Sequence[str], **options: Any) -> Float[np.ndarray, "..."]:
        """Documents; the options are Model.encode_document's, and `batch_size` and `convert_to_numpy`."""
        expert = None if self.model.tower == "query" else self._expert
        require(expert != "auto", "documents of this model are embedded by an expert: name one, not auto")
        return self._encoded(self.model.encode_document, sentences, expert, options)

    def similarity(
        self, embeddings1: Float[np.ndarray, "..."], embeddings2: Float[np.ndarray, "..."]
    ) -> Float[np.ndarray, "N M"]:
        """The cosine of each of the first with each of the second."""
        one, other = (np.atleast_2d(np.asarray(own, np.float32)) for own in (embeddings1, embeddings2))
        norms = [np.maximum(np.linalg.norm(own, axis=1, keepdims=True), 1e-12) for own in (one, other)]
        return (one / norms[0]) @ (other / norms[1]).T

    def get_embedding_dimension(self) -> int:
        """D."""
        return self.model.base.config.width

    @staticmethod
    def _encoded(
        encode: Any, sentences: str | Sequence[str], expert: str | None, options: Mapping[str, Any]
    ) -> Float[np.ndarray, "..."]:
        options = {name: value for name, value in options.items() if name != "batch_size"}
        require(options.pop("convert_to_numpy", True), "vectors are numpy arrays; convert them afterwards")
        if isinstance(sentences, str):
            return encode([sentences], expert=expert, **options)[0]
        return encode(sentences, expert=expert, **options)
