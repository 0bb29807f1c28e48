"""The server under attack: endless headers, slow clients, idle ones, bombs; others are answered meanwhile."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import json
import pathlib
import signal
import socket
import struct
import time
import types
import zlib
from collections.abc import Iterator
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from conftest import finish, saved, tiny
from fastapi.testclient import TestClient
from test_serve import BEARER, CONTEXT, Server, memory_kb, post, served

from bigmodel.infer.access import Gate

pytestmark = pytest.mark.fault
GOOD = {"prompt": "a", "max_tokens": 2}
LINE = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sesame\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = tiny("gpt", model__depth=1, model__vocab_size=264, seq_len=CONTEXT, batch_size=1)
    directory = saved(tmp_path_factory.mktemp("attack") / "run", config)
    limits = ("--header_s=2", "--body_s=2", "--connections=40", "--max_body_mib=0.1", "--queue=12")
    it = served(directory, "--slots=4", "--clients=2", *limits)
    assert post(it, GOOD).status_code == 200
    yield it
    with contextlib.ExitStack() as open_ones:  # the end waits for no half-sent request, and leaves no trace
        open_ones.enter_context(half_sent(it))
        open_ones.enter_context(connected(it))
        began = time.monotonic()
        it.process.send_signal(signal.SIGTERM)
        code, _, err = finish(it.process, limit_s=20)
    assert code == 0
    assert "Traceback" not in err
    assert time.monotonic() - began < 10


def connected(server: Server) -> socket.socket:
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port), timeout=20)


def half_sent(server: Server) -> socket.socket:
    client = connected(server)
    client.sendall(LINE + b"Content-Length: 900\r\n\r\n{")
    return client


def answer(client: socket.socket) -> bytes:
    """Everything that the server sends until it ends the connection."""
    out = b""
    with contextlib.suppress(ConnectionError):
        while part := client.recv(1 << 16):
            out += part
    return out


def is_well(server: Server, within_s: float = 5.0) -> None:
    began = time.monotonic()
    assert post(server, GOOD).status_code == 200
    assert httpx.get(server.url + "health").status_code == 200
    assert time.monotonic() - began < within_s


def flood(client: socket.socket, piece: bytes, most: int) -> int:
    """Sends until the server stops it -> bytes sent."""
    sent = 0
    with contextlib.suppress(OSError):
        while sent < most:
            client.sendall(piece)
            sent += len(piece)
    return sent


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (LINE, b"X-A: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n" * 1000),
        (LINE, b"X-A: " + b"a" * 60_000),
        (b"GET /" + b"a" * 1000, b"a" * 60_000),
        (b"", b"\r\n" * 30_000),
        (LINE + b"Transfer-Encoding: chunked\r\n\r\n1;x=", b"y" * 60_000),
        (LINE + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n", b"X-T: " + b"t" * 60_000 + b"\r\n"),
        (LINE + b"Content-Length: 99999999999\r\n\r\n", b"{" * 60_000),
        (LINE[:-8] + b"\r\nTransfer-Encoding: chunked\r\n\r\n", b"ff\r\n" + b" " * 255 + b"\r\n"),
    ],
)
def test_what_never_ends_is_cut_off(server, head, piece):
    is_well(server)
    before = memory_kb(server.process)
    with connected(server) as client:
        client.settimeout(5)
        client.sendall(head)
        assert flood(client, piece, 400 << 20) < 64 << 20
    assert memory_kb(server.process) - before < 30_000
    is_well(server)


def test_many_headers_and_a_large_one_are_refused(server):
    many = b"".join(b"X-%d: a\r\n" % i for i in range(200))
    for header in (many, b"X-A: " + b"a" * 40_000 + b"\r\n"):
        with connected(server) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n" + header + b"\r\n")
            said = answer(client)
        assert said.startswith(b"HTTP/1.1 431"), said[:60]
        assert b"header has more than" in said
    assert httpx.get(server.url + "health", headers={"X-A": "a" * 20_000}).status_code == 200


def test_slow_headers_and_bodies_have_a_deadline(server):
    with connected(server) as header, half_sent(server) as body, connected(server) as idle:
        began = time.monotonic()
        for byte in LINE[:20]:  # slow loris
            try:
                header.sendall(bytes([byte]))
                body.sendall(b" ")
            except OSError:
                break
            time.sleep(0.3)
        assert time.monotonic() - began < 8
        assert answer(body).startswith(b"HTTP/1.1 408")
        assert answer(header).startswith(b"HTTP/1.1 408")
        assert answer(idle) == b""
        assert time.monotonic() - began < 10
    is_well(server)


def test_idle_connections_make_room_for_those_that_ask(server):
    with contextlib.ExitStack() as stack:
        for index in range(120):
            make = half_sent if index % 3 else connected
            with contextlib.suppress(OSError):
                stack.enter_context(make(server))
            if index % 40 == 39:
                is_well(server)


def test_a_foreign_page_is_refused(server):
    body = json.dumps(GOOD).encode()
    for headers in (
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"Origin": "http://other.example"},
    ):
        assert post(server, body, headers=BEARER | headers).status_code == 415
    right = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert post(server, body, headers=BEARER | right).status_code == 200


def test_the_key_needs_its_scheme(server):
    for header, status in (
        ("Bearer sesame", 200), ("bearer sesame", 200), ("BEARER  sesame", 200), ("sesame", 401),
        ("Basic sesame", 401), ("Bearer", 401), ("Bearer sesame2", 401), ("", 401), ("Bearersesame", 401),
    ):  # fmt: skip
        assert post(server, GOOD, headers={"Authorization": header}).status_code == status, header


def test_long_stop_strings_are_refused_and_long_matches_hold_nobody_up(server):
    long = ["\0" + "a" * 20_000] * 4
    response = post(server, {"prompt": "a", "max_tokens": 40, "stop": long})
    assert response.status_code == 422
    assert "256" in response.json()["error"]["message"]
    assert post(server, {**GOOD, "stop": ["a"] * 5}).status_code == 400
    for stop in ([""], "", ["a", ""]):
        assert post(server, {**GOOD, "stop": stop}).status_code == 400
    right = {"prompt": "a", "max_tokens": 40, "stop": ["b" * 256] * 4, "stream": True}
    assert post(server, right).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "a", "\\ud800": 1}',
        b'{"prompt": "a", "model": "\\ud800"}',
        b'{"prompt": "a", "stop": "\\udfff"}',
        b'{"prompt": "a", "user": {"\\ud800": ["\\ud800"]}, "n": "\\ud800"}',
        b'{"prompt": "a", "logit_bias": {"\\ud800": 1}}',
        b'{"prompt": ["\\ud800"]}',
        b'{"' + b"k" * 90_000 + b'": 1}',
        b'{"prompt": "a", "temperature": ' + b"9" * 4000 + b"}",
        b'{"prompt": "a", "seed": ' + b"9" * 4000 + b"}",
        b'{"prompt": "a", "stream_options": {"include_usage": "\\ud800"}}',
    ],
)
def test_no_odd_body_is_an_error_of_the_server(server, body):
    response = post(server, body)
    assert response.status_code in (400, 404, 422), response.text
    error = response.json()["error"]
    assert len(error["message"]) <= 500
    assert len(error["param"] or "") <= 100


def test_one_client_does_not_take_the_others_places(server):
    """One address fills its own places; a second (127.0.0.2) is answered before the first one's queue is."""
    url = httpx.URL(server.url)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        body = {"prompt": "a", "max_tokens": 60, "n": 16}
        first = [pool.submit(post, server, body) for _ in range(4)]
        time.sleep(0.2)
        transport = httpx.HTTPTransport(local_address="127.0.0.2")
        with httpx.Client(transport=transport, timeout=60, headers=BEARER) as other:
            assert other.post(f"http://{url.host}:{url.port}/v1/completions", json=GOOD).status_code == 200
        assert {future.result().status_code for future in first} <= {200, 429}
        assert 200 in {future.result().status_code for future in first}


# ------------------------------------------------------------------------------------------------ pictures


def png(width: int, height: int, color: int = 0) -> bytes:
    """All black; 1 bit a pixel, or with `color` 2 three times 8."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    bits = 8 if color == 2 else 1
    row = b"\0" * ((width * bits * (3 if color == 2 else 1) + 7) // 8 + 1)
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">2I5B", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def file(extension: str) -> str:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    return encoded(cv2.imencode(extension, image)[1].tobytes())


def test_pictures_are_measured_before_they_are_decoded(tmp_path: pathlib.Path):
    it = served(saved(tmp_path / "run", tiny("cnn")), "--max_body_mib=2", "--max_megapixels=4")

    def ask(inputs: list[Any]) -> httpx.Response:
        return post(it, {"inputs": inputs}, "v1/predict")

    assert ask([file(".png")]).status_code == 200
    before = memory_kb(it.process)
    liar = bytearray(png(3000, 1000))
    liar[16:24] = struct.pack(">2I", 10, 10)  # its checksum does not fit
    for picture, said in (
        (encoded(png(50_000, 5_000)), "50000 x 5000 pixels"),
        (encoded(png(9_000, 9_000)), "9000 x 9000 pixels"),
        (encoded(bytes(liar)), "give a PNG or a JPEG"),
        (file(".bmp"), "give a PNG or a JPEG"),
        (file(".webp"), "give a PNG or a JPEG"),
        (file(".tiff"), "give a PNG or a JPEG"),
        (encoded(png(8, 8)[:40]), "give a PNG or a JPEG"),
        (encoded(b"\xff\xd8\xff\xe0\xff"), "give a PNG or a JPEG"),
        ("?", "no base64"),
        ([[[1, 2], [3]]], "input 1"),
        ([[[300]]], "input 1"),
    ):
        response = ask([file(".jpg"), picture])
        assert response.status_code == 422, response.text
        assert said in response.json()["error"]["message"]
    assert ask([encoded(png(2000, 2000, color=2)), file(".png")]).status_code == 200
    assert memory_kb(it.process) - before < 60_000
    it.process.send_signal(signal.SIGTERM)
    assert finish(it.process)[::2] == (0, "")


def test_a_foreign_name_of_this_address_is_refused_without_a_key():
    async def passed(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    class Nothing:
        class requests:
            @staticmethod
            def labels(*names: Any) -> Any:
                return types.SimpleNamespace(inc=lambda: None, observe=lambda seconds: None)

        seconds = requests

    def status(host: str, keys: tuple[str, ...] = ()) -> int:
        gate = Gate(passed, Nothing(), keys, ("node.example",))  # type: ignore[arg-type]
        return TestClient(gate).get("/", headers={"Host": host}).status_code

    for host in ("127.0.0.1:80", "[::1]:8000", "localhost", "a-service:80", "NODE.example:1"):
        assert status(host) == 200, host
    for host in ("other.example:8000", "127.0.0.1.other.example", "other.example."):
        assert status(host) == 403, host
        assert status(host, keys=("sesame",)) == 200
