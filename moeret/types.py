"""The value types at moeret's border, and its letters.

Axis letters, the same everywhere: A answers of a memory's queries, B batch rows, C centroids of a sketch, L tokens, D embedding
width, E experts, H heads, I indexes, K hits, M a batch's document columns, N documents, P positives of a query, Q queries, R
rank, S slots (experts that one text mixes), T queries of a memory or texts of a pack, U experts that a batch uses.
Expert 0 is always the base itself: it has no delta, and abstaining is routing to it.
"""

from dataclasses import dataclass, field
from typing import Any

BASE_EXPERT = "base"
"""The name of expert 0 in routes, hits and on the command line."""
SHARED_EXPERT = "shared"
"""The name of the shared delta without any expert's own."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a corpus; `id` is unique in its domain, or among the documents without one.

    `metadata` is a JSON object with sorted keys, or empty: what a search can filter by, as text so that documents are hashable.
    """

    id: str
    text: str
    title: str = ""
    metadata: str = ""

    @property
    def contents(self) -> str:
        """The text that is embedded: the title, a space, the text (BEIR's convention)."""
        return f"{self.title} {self.text}".strip()


@dataclass(frozen=True, slots=True)
class Hit:
    """One ranked document: `rank` counts from 1, `expert` is the one whose index held it.

    `domain` is the document's own, empty for one without a domain: ids are unique in it. `metadata` is what its line said.

    `score` is the cosine and what words and memory add to it; after fusion by rank or chance, the fused score.
    """

    id: str
    score: float
    rank: int
    expert: str
    title: str
    text: str
    domain: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Route:
    """What the router made of one query; what an index's documents say counts where a Retriever was asked.

    `probabilities` maps every expert's name to its probability (they sum to 1); `experts` are the chosen ones with their
    weights, best first, and empty if the router `abstained` to the base.
    """

    probabilities: dict[str, float]
    experts: dict[str, float]
    abstained: bool
