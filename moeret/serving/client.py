"""Clients of the service, one that waits and one for asyncio, from one source."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import httpx2
import numpy as np

from moeret.errors import ConfigError, MoeretError
from moeret.retrieval.filters import Where, to_json
from moeret.types import Hit, Route

T = TypeVar("T")


class ServiceError(MoeretError):
    """The service refused a request, or is not there. `status` is HTTP's, 0 where there was no answer."""

    def __init__(self, message: str, status: int = 0):
        super().__init__(message)
        self.status = status


class _Calls:
    """Every call: its request, and what its answer becomes. `_call` sends it, at once or when awaited."""

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None, read: Callable[[Any], Any]) -> Any:
        raise NotImplementedError

    def search(
        self,
        query: str,
        k: int = 10,
        *,
        route: str = "auto",
        experts: int | None = None,
        fusion: str | None = None,
        where: Where | None = None,
    ) -> Any:
        """The best `k` hits for a query, as Retriever.search gives them."""
        options: dict[str, Any] = {"query": query, "k": int(k), "route": route, "experts": experts, "fusion": fusion}
        options["where"] = None if where is None else json.loads(to_json(where))
        return self._call("POST", "/search", options, lambda answer: [*map(_hit, answer["hits"])])

    def route(self, query: str) -> Any:
        """Which experts a query uses."""
        return self._call("POST", "/route", {"query": query}, lambda answer: Route(**answer))

    def encode_query(self, inputs: Sequence[str], *, expert: str = "auto") -> Any:
        """Unit vectors of queries: float32 [N, D]."""
        return self._embed(inputs, expert, "query")

    def encode_document(self, inputs: Sequence[str], *, expert: str = "base") -> Any:
        """Unit vectors of documents: float32 [N, D]."""
        return self._embed(inputs, expert, "document")

    def experts(self) -> Any:
        """The service's experts and their documents, as a dictionary."""
        return self._call("GET", "/experts", None, lambda answer: answer)

    def _embed(self, texts: Sequence[str], expert: str, side: Literal["query", "document"]) -> Any:
        if isinstance(texts, str):
            raise ConfigError("inputs must be a list of strings; for one text pass [text]")
        body = {"texts": list(texts), "expert": expert, "input_type": side}
        return self._call("POST", "/embed", body, lambda answer: np.array(answer["embeddings"], np.float32))


def _hit(raw: Mapping[str, Any]) -> Hit:
    names = ("id", "score", "rank", "expert", "title", "text", "domain", "metadata")
    return Hit(**{name: raw[name] for name in names})


def _read(response: httpx2.Response, read: Callable[[Any], T]) -> T:
    """What an answer becomes. Raises ServiceError unless it is a good one."""
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if response.is_success and answer is not None:
        return read(answer)
    detail = answer.get("detail") if isinstance(answer, dict) else None
    raise ServiceError(
        f"{response.request.url} answered {response.status_code}: {detail or response.text[:200]}", response.status_code
    )


def _settings(url: str, key: str | None, timeout: float) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return {"base_url": url, "headers": headers, "timeout": timeout}


class Client(_Calls):
    """Asks a service and waits for its answers; may be shared by threads.

    Args:
      url: of the service, such as http://localhost:8000.
      key: if it wants one.
      timeout: seconds that it may take.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 30.0):
        self._http = httpx2.Client(**_settings(url, key, timeout))

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None, read: Callable[[Any], T]) -> T:
        try:
            response = self._http.request(method, path, json=body)
        except httpx2.HTTPError as error:
            raise ServiceError(f"{self._http.base_url} gave no answer: {error or type(error).__name__}") from error
        return _read(response, read)

    def close(self) -> None:
        """Gives its connections back."""
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(_Calls):
    """As Client, for asyncio: every call is to be awaited."""

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 30.0):
        self._http = httpx2.AsyncClient(**_settings(url, key, timeout))

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None, read: Callable[[Any], T]) -> T:
        try:
            response = await self._http.request(method, path, json=body)
        except httpx2.HTTPError as error:
            raise ServiceError(f"{self._http.base_url} gave no answer: {error or type(error).__name__}") from error
        return _read(response, read)

    async def close(self) -> None:
        """Gives its connections back."""
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
