"""What goes over the wire: every request and answer of the service, which its OpenAPI page shows."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from moeret.retrieval.fusion import Fusion


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode text: it has half of a surrogate pair") from None
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must have some text")
    return _encodable(text)


Text = Annotated[str, AfterValidator(_encodable)]
Query = Annotated[str, AfterValidator(_not_blank), Field(min_length=1, examples=["who may sign for the company"])]
Name = Annotated[str, AfterValidator(_encodable), Field(min_length=1, max_length=200)]


class Strict(BaseModel):
    """A request: names that are not known are refused, so that a mistyped one is not ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)


class SearchRequest(Strict):
    """A query, and how to search for it, as Retriever.search takes it."""

    query: Query
    k: int = Field(10, ge=1, description="how many hits")
    where: dict[str, Any] | None = Field(
        None, description="only documents whose metadata fulfil this", examples=[{"year": {"gte": 2020}}]
    )
    route: Name = Field("auto", description="auto, all, base, shared or an expert's name", examples=["auto"])
    experts: int | None = Field(None, ge=1, description="at most so many experts; the router decides unless given")
    fusion: Fusion | None = Field(
        None, description="how several experts' lists become one; the model's own unless given"
    )
    texts: bool = Field(True, description="whether hits come with their whole text")
    snippets: bool = Field(False, description="whether hits come with the part of the text that has the query's words")


class Snippet(BaseModel):
    """Part of a hit's text, and where in it and in the title the query's words stand."""

    text: str
    before: bool = Field(description="whether the text begins before it")
    after: bool = Field(description="whether the text goes on behind it")
    words: list[tuple[int, int]] = Field(description="[start, end) of each word in the snippet")
    title_words: list[tuple[int, int]] = Field(description="[start, end) of each word in the title")


class SearchHit(BaseModel):
    """One ranked document."""

    rank: int
    id: str
    score: float
    expert: str = Field(description="whose index held it")
    domain: str = Field(description="the document's own, empty for one without a domain")
    title: str
    text: str | None
    metadata: dict[str, Any]
    snippet: Snippet | None


class RouteAnswer(BaseModel):
    """What the router made of a query."""

    probabilities: dict[str, float] = Field(description="every expert's; they sum to 1")
    experts: dict[str, float] = Field(description="those that are used, with their weights, best first")
    abstained: bool


class SearchAnswer(BaseModel):
    """Hits, best first."""

    hits: list[SearchHit]
    route: RouteAnswer | None = Field(description="none where the request named an expert, base or shared")
    indexes: list[str] = Field(description="the experts whose indexes were searched")
    milliseconds: dict[str, float] = Field(
        description="of each stage; queries that are embedded and searched together share these times"
    )
    snapshot: int = Field(description="the number of the index's snapshot that was searched")


class RouteRequest(Strict):
    """A query to route."""

    query: Query


class EmbedRequest(Strict):
    """Texts to embed."""

    texts: list[Text] = Field(min_length=1, examples=[["a query", "another"]])
    expert: Name = Field("auto", description="auto, base, shared or an expert's name", examples=["auto"])
    input_type: Literal["query", "document"] = "query"


class EmbedAnswer(BaseModel):
    """A vector for each text."""

    embeddings: list[list[float]]


class EmbeddingsRequest(BaseModel):
    """OpenAI's request for embeddings. `input_type` is ours, as several other services have it."""

    model_config = ConfigDict(strict=True)

    input: Text | Annotated[list[Text], Field(min_length=1)] = Field(examples=["a query"])
    model: Name = Field("auto", description="auto, base, shared or an expert's name", examples=["auto"])
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, description="the base's width, or left out", ge=1)
    user: str | None = None
    input_type: Literal["query", "document"] = "query"


class Embedding(BaseModel):
    """One of OpenAI's embeddings."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="numbers, or little-endian 32-bit floats in base64")


class Usage(BaseModel):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    """OpenAI's list of embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class ModelEntry(BaseModel):
    """One of OpenAI's models."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "moeret"


class ModelsAnswer(BaseModel):
    """OpenAI's list of models: what `model` may name."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class ExpertAnswer(BaseModel):
    """An expert and its index."""

    name: str
    documents: int
    strength: float | None = Field(description="how much of its delta is used; none for the base")


class ExpertsAnswer(BaseModel):
    """The experts, the base first."""

    experts: list[ExpertAnswer]
    documents: int = Field(description="of all experts; one that lies in two indexes counts once")
    base: str = Field(description="the base encoder")
    shared: bool = Field(description="whether there is a shared delta, the route `shared`")
    width: int = Field(description="numbers in a vector")
    tower: Literal["query", "both"]
    snapshot: int


class State(BaseModel):
    """Whether the service lives, or can answer."""

    status: str


class Problem(BaseModel):
    """What was wrong with a request."""

    detail: str
