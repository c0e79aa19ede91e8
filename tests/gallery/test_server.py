"""gallery/server.py over real sockets: what is answered, and above all what is refused."""

import io
import json
import re
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from support.tiny_gallery import make_demo, make_library, served

from lift_fast.errors import ConfigError
from lift_fast.gallery import Server
from lift_fast.gallery import server as module

EVIL = "http://evil.example"
PAGE = ("/", "/style.css", "/gallery.js", "/icon.svg")


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    library = make_library(make_demo(tmp_path_factory.mktemp("demo") / "demo"))
    with served(library) as server:
        yield server


@pytest.fixture
def port(server) -> int:
    return server.server_port


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def received(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def parsed(data: bytes) -> Answer:
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    assert first.startswith("HTTP/1.0 "), first
    return Answer(int(first.split()[1]), headers, body)


def raw(port: int, data: bytes, half_close: bool = False) -> Answer:
    with connected(port) as connection:
        connection.sendall(data)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        return parsed(received(connection))


def head(port: int, method: str, path: str, *lines: str, host: str | None = "") -> bytes:
    """host: "" for the right one, None for none."""
    named = [] if host is None else [f"Host: {host or f'127.0.0.1:{port}'}"]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *named, *lines, "", ""]).encode("latin-1")


def get(port: int, path: str, *lines: str, host: str | None = "") -> Answer:
    return raw(port, head(port, "GET", path, *lines, host=host))


def post(port: int, path: str, body: bytes, *lines: str, kind: str = "application/json") -> Answer:
    sent = [f"Content-Type: {kind}", f"Content-Length: {len(body)}", *lines]
    return raw(port, head(port, "POST", path, *sent) + body)


def search(port: int, content, *lines: str) -> Answer:
    return post(port, "/api/text", json.dumps(content).encode(), *lines)


def assert_refused(answer: Answer, status: int, words: str = "") -> None:
    """A JSON sentence with the status, and all headers that protect."""
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json"
    assert words in answer.json["error"] and len(answer.json["error"]) > 10
    assert_protected(answer)


def assert_protected(answer: Answer) -> None:
    headers = answer.headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in headers
    assert "python" not in str(headers).lower()
    assert int(headers["content-length"]) == len(answer.body)


# ---- what is answered


@pytest.mark.parametrize("path", PAGE)
def test_the_page(port, path):
    answer = get(port, path)
    assert answer.status == 200 and len(answer.body) > 100
    assert_protected(answer)
    kinds = {"/": "text/html", "/style.css": "text/css", "/gallery.js": "text/javascript", "/icon.svg": "image/svg"}
    assert answer.headers["content-type"].startswith(kinds[path])


@pytest.mark.attack
def test_the_page_needs_nothing_from_elsewhere(port):
    text = b"".join(get(port, path).body for path in PAGE).decode()
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}  # the icon's namespace
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    html = get(port, "/").body.decode()
    assert not re.search(r"<script>|<style|\sstyle=|\son\w+=", html)


def test_answers(server, port):
    library = server.library
    assert get(port, "/api/gallery").json == library.description()
    assert search(port, {"text": "a red star", "image": 3}).json == library.search_text("a red star", 3)
    assert search(port, {"text": "ein röter Stern \U0001f31f", "image": None}).status == 200
    assert get(port, "/api/sample/12").json == library.sample(12)
    image = get(port, "/image/12")
    assert image.body == library.image(12)[0] and image.headers["content-type"] == "image/png"
    assert_protected(image)
    for kind in ("image/png", "application/octet-stream", "image/x; y=z"):
        assert post(port, "/api/image", image.body, kind=kind).json == library.search_image(image.body)
    last = len(library) - 1
    assert get(port, f"/image/{last}").status == get(port, f"/api/sample/{last}").status == 200


def test_many_at_once(server, port):
    texts = [f"a red star and {i} circles" for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda text: search(port, {"text": text}), texts))
    for text, answer in zip(texts, answers, strict=True):
        assert answer.json == server.library.search_text(text)


# ---- who asks


@pytest.mark.parametrize("path", [*PAGE, "/api/gallery", "/api/sample/1", "/image/1"])
@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "localhost", "127.0.0.1:1", "127.0.0.2:{port}", None])
def test_other_hosts(port, path, host):
    """What a page sends whose name has been pointed at 127.0.0.1, and what is no name of the server."""
    host = host and host.format(port=port)
    assert_refused(get(port, path, host=host), 403, "answers only at http://127.0.0.1:")


@pytest.mark.parametrize("host", ["localhost:{port}", "[::1]:{port}", "LocalHost:{port}"])
def test_own_hosts(port, host):
    assert get(port, "/api/gallery", host=host.format(port=port)).status == 200


def test_two_hosts(port):
    assert_refused(get(port, "/", f"Host: 127.0.0.1:{port}"), 403)
    assert_refused(get(port, f"http://127.0.0.1:{port}/", host="evil.example"), 403)


@pytest.mark.parametrize(
    "origin", [EVIL, "null", "https://127.0.0.1:{port}", "http://127.0.0.1", "http://localhost:{port}", "", "file://"]
)
def test_other_origins(port, origin):
    line = f"Origin: {origin.format(port=port)}"
    assert_refused(search(port, {"text": "a"}, line), 403, "no other site")
    assert_refused(post(port, "/api/image", b"x", line, kind="image/png"), 403)
    for path in ("/api/gallery", "/api/sample/1", "/image/1"):
        assert_refused(get(port, path, line), 403)


@pytest.mark.parametrize("site", ["cross-site", "same-site", "nonsense"])
def test_other_sites(port, site):
    """Images and scripts of a page elsewhere are requested without Origin. A link may lead to the page."""
    line = f"Sec-Fetch-Site: {site}"
    for path in ("/api/gallery", "/api/sample/1", "/image/1", "/gallery.js"):
        assert_refused(get(port, path, line), 403, "no other site")
    assert_refused(search(port, {"text": "a"}, line), 403)
    assert get(port, "/", line).status == 200


def test_the_own_page(port):
    lines = [f"Origin: http://127.0.0.1:{port}", "Sec-Fetch-Site: same-origin"]
    assert search(port, {"text": "a red star"}, *lines).status == 200
    assert get(port, "/api/sample/1", "Sec-Fetch-Site: none").status == 200


# ---- what is asked for


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/image/../../../etc/passwd", "//etc/passwd", "/image/%2e%2e/x", "/page/index.html", "/."]
    + ["/image/", "/image/-1", "/image/01", "/image/1.0", "/image/1e0", "/image/%31", "/image/1?x", "/image/1#x"]
    + ["/image/39", "/image/999999999999999999", "/image/" + "9" * 5000, "/image/１", "/api/sample/39", "/api/sample/"]
    + ["/index.html", "/server.py", "/api", "/api/", "/favicon.ico", "?", "*", "http://127.0.0.1/image/1", "/\\..\\x"],
)
def test_other_paths(server, port, path):
    assert len(server.library) == 39
    data = head(port, "GET", "PATH").replace(b"PATH", path.encode())
    assert_refused(raw(port, data), 404, "no such page")


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "CONNECT", "get", "X"])
def test_other_methods(port, method):
    for path in ("/", "/api/gallery", "/image/1", "/api/text"):
        answer = raw(port, head(port, method, path))
        assert answer.status == 405 and answer.headers["allow"] == ("POST" if path == "/api/text" else "GET")
        assert (answer.body == b"") is (method == "HEAD")  # with the length that a GET would have


def test_the_other_of_the_two_methods(port):
    for path in ("/", "/api/gallery", "/api/sample/1", "/image/1"):
        assert_refused(post(port, path, b"{}"), 405, "takes only GET")
    for path in ("/api/text", "/api/image"):
        assert_refused(get(port, path), 405, "takes only POST")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "image/png"]
)
def test_types_that_a_form_can_send(port, kind):
    assert_refused(post(port, "/api/text", b'{"text": "a"}', kind=kind), 415, kind)
    if kind != "image/png":
        assert_refused(post(port, "/api/image", b"x", kind=kind), 415, kind)


def test_no_type(port):
    assert_refused(raw(port, head(port, "POST", "/api/text", "Content-Length: 2") + b"{}"), 415, "missing")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b"nonsense", b"[" * 9000, b"[]", b'"text"', b"null", b"{}", b'{"text": 3}', b'{"text": null}']
    + [b'{"text": " \\n"}', b'{"text": "\\ud800"}', b'{"text": ["a"]}']
    + [b'{"text": "a", "image": %s}' % number for number in (b"-1", b"39", b"1.0", b"true", b'"1"', b"[1]", b"NaN")],
)
def test_queries_that_are_none(port, body):
    assert_refused(post(port, "/api/text", body), 400)


def test_a_text_without_tokens(port):
    assert_refused(search(port, {"text": "\u200b"}), 422, "token")


# ---- sizes


def test_a_query_of_10_mb(port):
    """Refused by its length, before any of it is there; and the answer arrives where all of it is sent at once."""
    length, kind = 10_000_000, "Content-Type: application/json"
    request = head(port, "POST", "/api/text", kind, f"Content-Length: {length}")
    with connected(port) as connection:
        connection.sendall(request)
        assert_refused(parsed(received(connection)), 413, "10000 are taken at most")
    with connected(port) as connection:
        connection.sendall(request)
        sent = 0
        try:
            while sent < length:
                sent += connection.send(bytes(1 << 16))
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert_refused(parsed(received(connection)), 413)
    assert sent < length  # the rest of it was never taken


def test_a_refusal_is_no_reset(port):
    """A browser would show the reset instead of the reason."""
    body = bytes(200_000)
    request = head(port, "POST", "/api/text", "Content-Type: application/json", f"Content-Length: {len(body)}")
    with connected(port) as connection:
        connection.sendall(request + body[:100_000])
        time.sleep(0.3)
        connection.sendall(body[100_000:])
        time.sleep(0.1)
        data = b""
        while part := connection.recv(1 << 16):
            data += part
    assert_refused(parsed(data), 413)


def test_lengths_at_the_limit(port):
    def query(size):
        return b'{"text": "%s"}' % (b"a" * (size - 12))

    assert post(port, "/api/text", query(module.MOST_TEXT)).status == 200
    assert_refused(post(port, "/api/text", query(module.MOST_TEXT + 1)), 413)
    lengths = ["Content-Type: image/png", f"Content-Length: {module.MOST_IMAGE + 1}"]
    assert_refused(raw(port, head(port, "POST", "/api/image", *lengths)), 413, "20000000 are taken at most")
    padded = get(port, "/image/5").body
    assert post(port, "/api/image", padded.ljust(module.MOST_IMAGE, b"\0"), kind="image/png").status == 200


def png_of(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


def test_images_of_many_pixels(server, port, monkeypatch):
    assert post(port, "/api/image", png_of(4000, 4000), kind="image/png").status == 200
    decoded = []
    monkeypatch.setattr(server.library, "search_image", decoded.append)
    for width, height in ((4000, 4001), (10_000, 5000), (10_000, 9000)):
        answer = post(port, "/api/image", png_of(width, height), kind="image/png")
        assert_refused(answer, 413, f"{width} x {height} pixels")
    # A bomb: a header that says 50 megapixels, without the pixels.
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 10_000, 5000, 8, 2, 0, 0, 0)
    small = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    small += struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    assert_refused(post(port, "/api/image", small, kind="image/png"), 413, "16 million")
    assert decoded == []


@pytest.mark.parametrize(
    "data", [b"", b"no image", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a", b"\0" * 99]
)
def test_images_that_are_none(port, data):
    assert_refused(post(port, "/api/image", data, kind="image/png"), 400, "cannot be read")


def test_an_image_that_is_damaged(port):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)).save(file, "PNG")
    damaged = bytearray(file.getvalue())
    damaged[200] ^= 255
    assert_refused(post(port, "/api/image", bytes(damaged), kind="image/png"), 422, "does not decode")


@pytest.mark.parametrize("lines", [["Transfer-Encoding: chunked"], []])
def test_bodies_of_unknown_length(port, lines):
    kind = "Content-Type: application/json"
    data = head(port, "POST", "/api/text", kind, *lines) + b'd\r\n{"text": "a"}\r\n0\r\n\r\n'
    assert_refused(raw(port, data), 411, "needs a Content-Length")
    both = head(port, "POST", "/api/text", kind, "Transfer-Encoding: chunked", "Content-Length: 13")
    assert_refused(raw(port, both + b'{"text": "a"}'), 411)


@pytest.mark.parametrize(
    "length", ["-1", "+13", "0x0d", "13,13", "1 3", "", "１３", "9" * 40, "13\r\nContent-Length: 14"]
)
def test_lengths_that_are_none(port, length):
    lines = ["Content-Type: application/json", f"Content-Length: {length}".encode().decode("latin-1")]
    assert_refused(raw(port, head(port, "POST", "/api/text", *lines) + b'{"text": "a"}'), 400, "not a number")


def test_a_body_that_is_too_short(port):
    data = head(port, "POST", "/api/text", "Content-Type: application/json", "Content-Length: 14") + b'{"text": "a"}'
    assert_refused(raw(port, data, half_close=True), 400, "ends after 13 of 14 bytes")


# ---- requests that are none


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"GET / HTTP/1.1 x\r\n\r\n", 400),
        (b"GET / HTTP/x\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 403),  # HTTP/0.9, without a Host
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + (b"X: " + b"y" * 2000 + b"\r\n") * 50 + b"\r\n", 431),
    ],
)
def test_nonsense_and_floods(port, data, status):
    answer = raw(port, data)
    assert answer.status == status and answer.json["error"]
    assert_protected(answer)
    assert get(port, "/api/gallery").status == 200


def test_no_request(port):
    with connected(port) as connection:
        connection.sendall(b"\r\n\r\n")
        assert received(connection) == b""


def test_a_flood_of_headers_without_end(port):
    """Nothing after the first 64 kB is taken."""
    with connected(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(1_000_000):
                connection.sendall(b"X: " + b"y" * 60_000 + b"\r\n")


# ---- slow clients


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(module, "_SECONDS", 0.4)


@pytest.mark.parametrize("begun", [b"", b"GET", b"GET / HTTP/1.1\r\nHost:", "body"])
def test_half_open_connections(port, impatient, begun):
    """They are closed in time, and nobody waits for them."""
    if begun == "body":
        begun = head(port, "POST", "/api/text", "Content-Type: application/json", "Content-Length: 99") + b"{"
    began = time.monotonic()
    with connected(port) as connection:
        connection.sendall(begun)
        assert get(port, "/api/gallery").status == 200
        data = received(connection)
    assert_refused(parsed(data), 408, "has not arrived") if begun else None
    assert time.monotonic() - began < 5


def test_a_client_that_sends_a_byte_at_a_time(port, impatient):
    """Each byte comes in time, the whole does not."""
    began = time.monotonic()
    with connected(port) as connection, pytest.raises((BrokenPipeError, ConnectionResetError)):
        for _ in range(200):
            connection.sendall(b"x")
            time.sleep(0.05)
    assert time.monotonic() - began < 5


def test_a_client_that_takes_no_answer(server, port, impatient, monkeypatch):
    monkeypatch.setattr(server.library, "image", lambda number: (bytes(30_000_000), "image/png"))
    with connected(port) as connection:
        connection.sendall(head(port, "GET", "/image/1"))
        time.sleep(1)
        data = received(connection)
    assert len(data) < 30_000_000 and data.count(b"HTTP/1.0") == 1


def test_a_client_that_has_gone(port, capfd):
    for data in (b"GET / HTT", head(port, "GET", "/image/1"), head(port, "GET", "/api/sample/12")):
        connection = connected(port)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset when it closes
        connection.sendall(data)
        connection.close()
    time.sleep(0.3)
    assert get(port, "/api/gallery").status == 200
    assert capfd.readouterr().err == ""


def test_too_many_connections(server, port, monkeypatch):
    def until(count):
        ends = time.monotonic() + 20
        while len(server._open) != count:
            assert time.monotonic() < ends
            time.sleep(0.02)

    until(0)  # those of earlier tests have left their places
    monkeypatch.setattr(server, "_free", threading.BoundedSemaphore(3))
    held = [connected(port) for _ in range(3)]
    until(3)
    with connected(port) as refused:
        assert received(refused) == b""
    for connection in held:
        connection.close()
    until(0)
    assert get(port, "/api/gallery").status == 200
    until(0)


# ---- the server itself


def test_a_bug_is_told_in_the_terminal_alone(server, port, monkeypatch, capfd):
    def fail(*arguments):
        raise RuntimeError("secret path")

    monkeypatch.setattr(server.library, "search_text", fail)
    answer = search(port, {"text": "a"})
    assert_refused(answer, 500, "its terminal has the reason")
    assert b"secret" not in answer.body and "RuntimeError: secret path" in capfd.readouterr().err


def test_it_listens_on_loopback_alone(server, port):
    assert server.socket.getsockname() == ("127.0.0.1", port)
    assert server.url == f"http://127.0.0.1:{port}/"


@pytest.mark.parametrize("other", [-1, 1 << 16, 1 << 70])
def test_ports_that_do_not_exist(other):
    with pytest.raises(ConfigError, match=f"cannot listen on port {other} "):
        Server(other)


def test_a_port_that_is_taken(port):
    with pytest.raises(ConfigError, match=f"cannot listen on port {port} of 127.0.0.1 .*; name another --port"):
        Server(port)
