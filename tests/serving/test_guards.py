"""Slow and broken clients are bounded; a service that is told to end answers what it has taken."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from moeret.serving.client import Client, ServiceError

IMPATIENT = "from moeret.serving import guards; guards._ARRIVAL = 1.0; from moeret.cli import main; main()"


def wait_for(process):
    """The port that a service listens on, once it is ready."""
    for line in process.stderr:
        if found := re.search(r"serving on http://127.0.0.1:(\d+)", line):
            return int(found[1])
    raise AssertionError("the service did not start")


@pytest.fixture
def start(index_folder):
    processes = []

    def run(*arguments, **environment):
        command = [sys.executable, "-c", IMPATIENT, "serve", str(index_folder), "--port", "0", *arguments]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
        processes.append(process)
        return process, wait_for(process)

    yield run
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()


def closed_after(port, first):
    """Seconds until the service closes a connection on which this comes and nothing more; what it answered."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(first)
        connection.settimeout(20)
        began, answer = time.monotonic(), b""
        with contextlib.suppress(ConnectionResetError):  # it does not read what is too much
            while part := connection.recv(4096):
                answer += part
        return time.monotonic() - began, answer


def test_a_service_of_its_own_process(start):
    process, port = start(MOERET_KEY="s3cret")
    head = b"POST /search HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer s3cret\r\nContent-Type: application/json\r\n"
    for silent in (b"", b"POST /search HTTP/1.1\r\nHost: x\r\n"):
        assert closed_after(port, silent)[0] < 10
    seconds, answer = closed_after(port, head + b"Content-Length: 50\r\n\r\n{")
    assert seconds < 10 and answer.startswith(b"HTTP/1.1 408")
    _, answer = closed_after(port, head + b"Content-Length: 99999999999\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 413")
    for broken in (
        b"\x00\xff\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
    ):
        assert closed_after(port, broken)[1].startswith(b"HTTP/1.1 400")
    assert closed_after(port, b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 200_000)[0] < 0.9

    with Client(f"http://127.0.0.1:{port}") as stranger, pytest.raises(ServiceError) as refused:
        stranger.search("gold")
    assert refused.value.status == 401
    with Client(f"http://127.0.0.1:{port}", key="s3cret") as client:
        assert client.search("gold", 3)[0].rank == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        with pytest.raises(ServiceError, match="gave no answer") as gone:
            client.search("gold")
    assert gone.value.status == 0


def test_what_was_taken_is_answered_before_it_ends(start):
    process, port = start("--wait", "1")
    body = json.dumps({"query": "gold and silver"}).encode()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"POST /search HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(body))
        connection.sendall(b"Content-Type: application/json\r\n\r\n" + body)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        connection.settimeout(20)
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 200")
    assert process.wait(20) == 0


def test_a_port_that_is_taken_is_said_before_the_index_is_read(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "moeret.cli", "serve", str(tmp_path), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (
        "in use; choose another with --port" in done.stderr and port in done.stderr and "Traceback" not in done.stderr
    )


def test_a_body_that_is_too_large_is_refused_and_its_sender_hears_it(start):
    _, port = start("--most-bytes", "1000")
    for size in (1001, 10**6, 10**7):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("POST", "/search", body=b"x" * size)
        assert connection.getresponse().status == 413
        connection.close()
