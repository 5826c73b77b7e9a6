"""moeret in Haystack: a retriever component. Needs the extra `haystack`."""

from typing import Any

from haystack import Document, component

from moeret.retrieval.search import Retriever


@component
class MoeretRetriever:
    """Searches an index: `MoeretRetriever(moeret.Retriever.load(index), top_k=5)`. `options` are those of Retriever.search.

    A document's `meta` are what its corpus says of it, and `title`, `expert` and `domain`.
    """

    def __init__(self, retriever: Retriever, top_k: int = 10, **options: Any):
        self._retriever, self._top_k, self._options = retriever, top_k, options

    @component.output_types(documents=list[Document])
    def run(self, query: str, top_k: int | None = None) -> dict[str, list[Document]]:
        """The best documents for a query."""
        hits = self._retriever.search(query, top_k or self._top_k, **self._options)
        return {
            "documents": [
                Document(
                    id=hit.id,
                    content=hit.text,
                    score=hit.score,
                    meta=hit.metadata | {"title": hit.title, "expert": hit.expert, "domain": hit.domain},
                )
                for hit in hits
            ]
        }
