"""Running the service."""

import signal
import socket
import threading
from pathlib import Path

import uvicorn

from moeret.config import Precision, ServeConfig, require
from moeret.errors import ConfigError
from moeret.retrieval.search import Retriever
from moeret.serving.app import make_app
from moeret.serving.guards import ImpatientProtocol, check_key
from moeret.terminal import complain

_BESIDE = 64
"""Connections beside those whose queries wait."""


class _Server(uvicorn.Server):
    """Says where it listens once it can answer."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for own in sockets or ():
            host, port = own.getsockname()[:2]
            complain(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}")


def serve(
    index: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    config: ServeConfig | None = None,
    key: str | None = None,
    precision: Precision | None = None,
    hybrid: bool = True,
) -> None:
    """Serves an index over HTTP until the process is told to end (SIGTERM or SIGINT); what has been taken is then answered.

    Args:
      index: index directory.
      host: the address to listen on; 0.0.0.0 for all of this machine's.
      port: to listen on; 0 for any that is free.
      config: what is taken, and how long it may take.
      key: if given, requests must carry the header `Authorization: Bearer KEY`.
      precision: of the products that embed queries, as for Retriever.load.
      hybrid: whether words and memories count beside the cosine, as for Retriever.load.

    Raises:
      ArtifactError: the index is damaged or unfinished.
      ConfigError: an argument that makes no sense, the port is taken, or the address is not this machine's.
    """
    config = config or ServeConfig()
    require(0 <= port < 65536, f"port must be in [0, 65535], got {port}")
    check_key(key)
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))  # it listens once the index is loaded
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port"
        ) from None
    with listening:
        app = make_app(Retriever.load(index, precision=precision, hybrid=hybrid), config, key=key)
        server = _Server(
            uvicorn.Config(
                app,
                http=ImpatientProtocol,
                ws="none",
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=config.most_waiting + _BESIDE,
                timeout_graceful_shutdown=int(config.deadline) + 1,
            )
        )
        if threading.current_thread() is threading.main_thread():
            for ending in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them once more when it has ended
                signal.signal(ending, lambda *_: None)
        server.run(sockets=[listening])
