"""moeret in LangChain: a retriever and embeddings. Needs the extra `langchain`."""

from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever

from moeret.integrations.sentence_encoder import SentenceEncoder


class MoeretRetriever(BaseRetriever):
    """Searches an index: `MoeretRetriever(retriever=moeret.Retriever.load(index), k=5)`. `options` are those of Retriever.search.

    A document's metadata are what its corpus says of it, and `title`, `score`, `expert` and `domain`.
    """

    retriever: Any
    k: int = 10
    options: dict[str, Any] = {}  # noqa: RUF012 (pydantic copies it)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [
            Document(
                id=hit.id,
                page_content=hit.text,
                metadata=hit.metadata
                | {"title": hit.title, "score": hit.score, "expert": hit.expert, "domain": hit.domain},
            )
            for hit in self.retriever.search(query, self.k, **self.options)
        ]


class MoeretEmbeddings(Embeddings):
    """Unit vectors of a model: `MoeretEmbeddings(SentenceEncoder(model, expert="law"))`."""

    def __init__(self, encoder: SentenceEncoder):
        self._encoder = encoder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """A vector for each document."""
        return self._encoder.encode_document(texts, normalize_embeddings=True).tolist()

    def embed_query(self, text: str) -> list[float]:
        """A query's vector."""
        return self._encoder.encode_query(text, normalize_embeddings=True).tolist()
