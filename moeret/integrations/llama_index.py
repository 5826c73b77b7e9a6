"""moeret in LlamaIndex: a retriever. Needs the extra `llama-index`."""

from typing import Any

from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from moeret.retrieval.search import Retriever


class MoeretRetriever(BaseRetriever):
    """Searches an index: `MoeretRetriever(moeret.Retriever.load(index), k=5)`. `options` are those of Retriever.search.

    A node's metadata are what its corpus says of it, and `title`, `expert` and `domain`.
    """

    def __init__(self, retriever: Retriever, k: int = 10, **options: Any):
        super().__init__()
        self._retriever, self._k, self._search_options = retriever, k, options

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        hits = self._retriever.search(query_bundle.query_str, self._k, **self._search_options)
        return [
            NodeWithScore(
                node=TextNode(
                    id_=hit.id,
                    text=hit.text,
                    metadata=hit.metadata | {"title": hit.title, "expert": hit.expert, "domain": hit.domain},
                ),
                score=hit.score,
            )
            for hit in hits
        ]
