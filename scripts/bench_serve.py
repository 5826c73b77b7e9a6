"""The service under load: latency, memory, what batching gains, and what becomes of queries when it is killed.

  python -m scripts.bench_serve --index INDEX --data DATA [--clients 32] [--minutes 5] [--rounds 3]

INDEX is one of `moeret index`; DATA a folder with the BEIR folders of its experts, whose test queries are asked. The service is a
process of its own and the clients are another, on the same machine. Writes a section of BENCHMARKS.md.
"""

import asyncio
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import tyro

import moeret
from moeret.config import Precision
from moeret.serving.client import AsyncClient, ServiceError
from scripts.bench_search import K, test_queries
from scripts.benchmarks import fast_precision, markdown_table, write_section

TAIL, GROWN, GAIN = 4.0, 1.05, 2.0
"""Bounds: p99 against p50, memory in the last fifth against the second, queries a second against those of one at a time."""
ROUND_SECONDS = 30
KILLS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Asks a service from many clients."""

    index: Path
    """Index directory."""
    data: Path
    """Folder with the BEIR folders of the index's experts."""
    clients: int = 32
    """How many ask at once, each one query after another."""
    minutes: float = 5
    """How long the long run takes."""
    rounds: int = 3
    """Of queries in batches and one at a time, in turns."""
    precision: Precision = field(default_factory=fast_precision)
    """Of the service."""


class Service:
    """`moeret serve` in a process of its own, ready to answer."""

    def __init__(self, arguments: Arguments, *options: str, port: int = 0):
        command = [sys.executable, "-m", "moeret.cli", "serve", str(arguments.index), "--port", str(port), *options]
        command += ["--precision", arguments.precision]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        told = next((own for line in self._process.stderr if (own := re.search(r"http://\S+:(\d+)", line))), None)
        if told is None:
            raise SystemExit("the service did not start")
        self.url, self.port = told[0], int(told[1])
        while not self._ready():
            time.sleep(0.1)

    def _ready(self) -> bool:
        if self._process.poll() is not None:
            raise SystemExit("the service ended before it was ready")
        try:
            return urlopen(f"{self.url}/ready").status == 200
        except HTTPError:  # 503: programs are still compiled
            return False

    def mebibytes(self) -> float:
        """What the process holds in memory."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    def end(self, how: int = signal.SIGTERM) -> None:
        """Ends it."""
        os.kill(self._process.pid, how)
        self._process.wait()
        self._process.stderr.close()


@dataclass
class Load:
    """What clients met."""

    milliseconds: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    memory: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.milliseconds) / self.seconds


async def load(
    service: Service, queries: list[str], clients: int, seconds: float, *, until: asyncio.Event | None = None
) -> Load:
    """Asks for so long, or until something has happened; a client whose query failed waits a little and asks another."""
    met, began = Load(), time.monotonic()

    async def ask(number: int) -> None:
        async with AsyncClient(service.url, timeout=60) as client:
            for turn in range(number, 10**9, clients):
                if time.monotonic() - began > seconds or (until and until.is_set()):
                    return
                met.asked += 1
                asked = time.perf_counter()
                try:
                    await client.search(queries[turn % len(queries)], K)
                    met.milliseconds.append(1000 * (time.perf_counter() - asked))
                except ServiceError as error:
                    met.errors[str(error.status or "no answer")] += 1
                    await asyncio.sleep(0.2)

    async def watch() -> None:
        while True:
            met.memory.append(service.mebibytes())
            await asyncio.sleep(2)

    watching = asyncio.create_task(watch()) if until is None else None
    await asyncio.gather(*(ask(number) for number in range(clients)))
    if watching:
        watching.cancel()
    met.seconds = time.monotonic() - began
    return met


async def kill(arguments: Arguments, queries: list[str]) -> Load:
    """Kills a service that is asked, starts it again on its port, and ends it when it answers."""
    service, over = Service(arguments), asyncio.Event()
    asking = asyncio.create_task(load(service, queries, arguments.clients, 600, until=over))
    await asyncio.sleep(3)
    service.end(signal.SIGKILL)
    again = await asyncio.to_thread(Service, arguments, port=service.port)
    await asyncio.sleep(3)
    over.set()
    met = await asking
    again.end()
    return met


def main() -> None:
    """Runs the benchmark and writes its section."""
    arguments = tyro.cli(Arguments, description=__doc__)
    retriever = moeret.Retriever.load(arguments.index)
    queries = test_queries(retriever, arguments.data, 2000)
    documents = sum(retriever.sizes.values())
    retriever.close()
    rates: dict[str, list[float]] = {"together": [], "one at a time": []}
    for _ in range(arguments.rounds):
        for name, options in (("together", ()), ("one at a time", ("--batch-tokens", "1", "--wait", "0"))):
            service = Service(arguments, *options)
            asyncio.run(load(service, queries, arguments.clients, 5))
            rates[name].append(asyncio.run(load(service, queries, arguments.clients, ROUND_SECONDS)).rate)
            service.end()
    service = Service(arguments)
    asyncio.run(load(service, queries, arguments.clients, 5))
    met = asyncio.run(load(service, queries, arguments.clients, 60 * arguments.minutes))
    service.end()
    lost = [asyncio.run(kill(arguments, queries)) for _ in range(KILLS)]

    p50, p99 = (float(np.percentile(met.milliseconds, share)) for share in (50, 99))
    fifth = max(1, len(met.memory) // 5)
    early, late = (statistics.median(own) for own in (met.memory[fifth : 2 * fifth], met.memory[-fifth:]))
    together, alone = (statistics.median(own) for own in rates.values())
    unanswered = sum(own.asked - len(own.milliseconds) - sum(own.errors.values()) for own in lost)

    def verdict(holds: bool, bound: str) -> str:
        return f"({'holds' if holds else '**fails**'}: {bound})"

    rows = [[name, *(f"{own:.1f}" for own in found)] for name, found in rates.items()]
    body = [
        f"{arguments.clients} clients, each one query after another, {K} hits each, of {len(queries)} test queries over "
        f"{documents:,} documents; the service computes in {arguments.precision}, and the clients share its cores.",
        markdown_table(["queries a second", *(f"round {number + 1}" for number in range(arguments.rounds))], rows),
        "\n".join([
            f"- embedded and searched together: {together / alone:.2f} times as many as one at a time "
            f"{verdict(together >= GAIN * alone, f'at least {GAIN:g}')}",
            f"- {arguments.minutes:g} minutes: {len(met.milliseconds):,} answers, {met.rate:.1f} a second; errors: "
            f"{sum(met.errors.values())} {verdict(not met.errors, 'none')}",
            f"- p50 {p50:.1f} ms, p99 {p99:.1f} ms: {p99 / p50:.2f} times {verdict(p99 <= TAIL * p50, f'at most {TAIL:g}')}",
            f"- memory: {early:.0f} MiB in the second fifth of the time, {late:.0f} in the last "
            f"{verdict(late <= GROWN * early, f'at most {GROWN:g} times')}",
            f"- killed with SIGKILL under load and started again, {KILLS} times: {sum(len(own.milliseconds) for own in lost):,} "
            f"queries answered, {sum(sum(own.errors.values()) for own in lost)} told that there was no answer, {unanswered} "
            f"neither {verdict(unanswered == 0, 'none')}",
        ]),
    ]  # fmt: skip
    print("\n\n".join(body))
    extra = {name: version(name) for name in ("fastapi", "uvicorn", "httpx2")}
    write_section("serve", "The service under load", "\n\n".join(body), extra)


if __name__ == "__main__":
    main()
