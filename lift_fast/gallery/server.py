"""The server of the gallery: one page and a few JSON answers, for browsers on this machine alone.

It listens on 127.0.0.1, which other machines cannot reach. What other pages in the same browser could do to it is
refused: by the Host header (a name that a page has pointed at 127.0.0.1, DNS rebinding), by Origin and Sec-Fetch-Site
(requests of other sites), by types of content that a form cannot send, and by headers that keep the page out of frames.
A request is known by its exact path, an image only by its number. Sizes and times are limited before anything is read.

    GET  /, /style.css, /gallery.js, /icon.svg    the page
    GET  /api/gallery                             models and sets
    POST /api/text   {"text": …, "image": N}      each model's images for a text; image: the one to give the rank of
    POST /api/image  an encoded image             each model's nearest images, and best captions
    GET  /api/sample/N                            caption and foils of an image, with each model's scores
    GET  /image/N                                 the image, as the data set holds it

An answer that is no success is {"error": a sentence}. A connection serves one request.
"""

import contextlib
import io
import json
import os
import re
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from .. import foreign
from ..data.captions import halved
from ..data.images import read_header
from ..data.samples import BadSample
from ..errors import ConfigError, LiftFastError
from ..printable import printable
from .library import Library

HOST = "127.0.0.1"
MOST_TEXT = 10_000  # bytes of a query's JSON
MOST_IMAGE = 20_000_000  # bytes of an image that is sent
MOST_PIXELS = 16_000_000  # of it; checked in its header, before it is decoded
_MOST_HEAD = 1 << 16  # bytes of the request line and the headers
_SECONDS = 20.0  # for a whole request to arrive, and again for its answer to be taken
_CONNECTIONS = 64  # at once
_DRAINED = 1 << 20  # bytes of a refused body that are read and dropped, …
_DRAIN_SECONDS = 1.0  # … and for how long, so that the client sees the answer and not a reset connection
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/gallery.js": ("gallery.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_NUMBERED = re.compile(r"/(image|api/sample)/(0|[1-9][0-9]{0,17})")
_JSON, _ANY_BYTES = "application/json", "application/octet-stream"


class Refused(Exception):
    """A request that is not served: a status, a sentence for the client, and for status 405 the method to take."""

    def __init__(self, status: int, reason: str, allow: str = ""):
        super().__init__(reason)
        self.status, self.reason, self.allow = status, reason, allow


class Server(ThreadingHTTPServer):
    """A port of 127.0.0.1, taken when it is made, on which `serve` serves a Library.

    port: 0 for any free one; `url` has the one that was taken. `server_close` frees it. Raises ConfigError when the
    port cannot be had.
    """

    # server_close ends them: one that outlived it could hold the last reference to a model, and torch aborts where a
    # tensor is freed on another thread while Python ends.
    daemon_threads = False
    allow_reuse_address = os.name == "posix"  # elsewhere it would share the port with another process
    request_queue_size = 128

    library: Library

    def __init__(self, port: int = 0):
        self.page = {name: (files(__package__) / "page" / name).read_bytes() for name, _ in _PAGE.values()}
        self._free = threading.BoundedSemaphore(_CONNECTIONS)
        self._open: set[socket.socket] = set()
        try:
            super().__init__((HOST, port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"cannot listen on port {port} of {HOST} ({reason}); name another --port, or 0 for any free one"
            ) from error
        self.url = f"http://{HOST}:{self.server_port}/"
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost", "[::1]")}

    def serve(self, library: Library) -> None:
        """Serves until `shutdown` is called on another thread, or an exception such as KeyboardInterrupt. Then waits
        for what the models compute at the moment. Requests that came before wait in the port's queue."""
        self.library = library
        # On a thread of its own: a KeyboardInterrupt within it could leave a connection's thread half started.
        accepting = threading.Thread(target=self.serve_forever, daemon=True)
        try:
            accepting.start()
            while accepting.is_alive():
                accepting.join(0.5)  # with a time limit Windows lets Ctrl-C through
        finally:
            if accepting.ident is not None:
                self.shutdown()
            library.close()

    def server_close(self) -> None:
        """Frees the port, ends all connections, and waits for their threads."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def server_bind(self) -> None:
        """Binds without http.server's search for this machine's name, which may wait for a network."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serves a connection on a thread of its own; closes it at once when there are too many."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        self._open.add(request)
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread can be started
            self._open.discard(request)
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """On the connection's thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()
            self._open.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone or stalls is none of the user's business; anything else is a bug to be seen."""
        if not isinstance(sys.exc_info()[1], OSError):
            print_traceback()


class _Timed(io.RawIOBase):
    """The bytes that a client sends, as long as they come within the time and the budget of a request."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.ends = time.monotonic() + _SECONDS
        self.budget = _MOST_HEAD

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Raises Refused."""
        if self.budget <= 0:
            raise Refused(431, f"the request's headers are longer than {_MOST_HEAD} bytes")
        try:
            self.connection.settimeout(max(0.001, self.ends - time.monotonic()))
            read = self.connection.recv_into(memoryview(buffer)[: self.budget])
        except TimeoutError as error:
            raise Refused(408, f"the request has not arrived within {_SECONDS:g} seconds") from error
        self.budget -= read
        return read


class Handler(BaseHTTPRequestHandler):
    """One request: checks it, reads its body, answers."""

    server: Server
    server_version, sys_version = "lift-fast", ""
    default_request_version = "HTTP/1.0"  # where a request names none
    command, requestline, request_version = "", "", "HTTP/1.0"  # until the request has been parsed

    def setup(self) -> None:
        """As the base class, with a limit on the time and the size of the whole request."""
        super().setup()
        self.timed = _Timed(self.connection)
        self.rfile = io.BufferedReader(self.timed)

    def handle(self) -> None:
        """Serves the one request of the connection."""
        try:
            self.raw_requestline = self.rfile.readline(_MOST_HEAD)
            if self.raw_requestline and self.parse_request():
                self.timed.budget = MOST_IMAGE
                self.answer(200, *self.result(self.route()))
        except Refused as refused:
            headers = {"Allow": refused.allow} if refused.allow else {}
            self.answer(refused.status, *as_json({"error": refused.reason}), headers)

    def result(self, make: Callable[[], tuple[bytes, str]]) -> tuple[bytes, str]:
        """What make() returns. Raises Refused where it fails."""
        try:
            return make()
        except (LiftFastError, BadSample) as error:
            raise Refused(422, str(error)) from error
        except CancelledError as error:
            raise Refused(503, "the gallery has ended") from error
        except Exception as error:
            print_traceback()
            raise Refused(500, "the gallery failed; its terminal has the reason") from error

    def route(self) -> Callable[[], tuple[bytes, str]]:
        """The function that makes the answer, and its type of content. Raises Refused."""
        self.check_origin()
        library = self.server.library
        if self.path in _PAGE:
            self.require("GET")
            name, kind = _PAGE[self.path]
            return lambda: (self.server.page[name], kind)
        if self.path == "/api/gallery":
            self.require("GET")
            return lambda: as_json(library.description())
        if self.path == "/api/text":
            self.require("POST", _JSON)
            query = parsed(self.body(MOST_TEXT))
            text, image = query.get("text"), query.get("image")
            if not isinstance(text, str) or not text.strip() or halved(text):
                raise Refused(400, 'the query needs a "text" that is not blank')
            if image is not None and (type(image) is not int or not 0 <= image < len(library)):
                raise Refused(400, f'"image" must be a number from 0 to {len(library) - 1}')
            return lambda: as_json(library.search_text(text, image))
        if self.path == "/api/image":
            self.require("POST", "image/", _ANY_BYTES)
            data = small_enough(self.body(MOST_IMAGE))
            return lambda: as_json(library.search_image(data))
        numbered = _NUMBERED.fullmatch(self.path)
        if numbered and int(numbered[2]) < len(library):
            self.require("GET")
            number = int(numbered[2])
            if numbered[1] == "image":
                return partial(library.image, number)
            return lambda: as_json(library.sample(number))
        raise Refused(404, "there is no such page")

    def check_origin(self) -> None:
        """Raises Refused for requests that are not made for this server's own address, by its own page or by hand."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0].lower() not in self.server.hosts:
            raise Refused(403, f"the gallery answers only at {self.server.url} and as localhost")
        origins = self.headers.get_all("Origin", [])
        if any(origin.lower() != f"http://{hosts[0].lower()}" for origin in origins):
            raise Refused(403, "the gallery answers no other site")
        sites = self.headers.get_all("Sec-Fetch-Site", [])
        if any(site not in ("same-origin", "none") for site in sites) and self.path != "/":  # to which a link may lead
            raise Refused(403, "the gallery answers no other site")

    def require(self, method: str, *kinds: str) -> None:
        """Raises Refused for another method, and for a body of none of these types ("image/": all that begin so)."""
        if self.command != method:
            raise Refused(405, f"{self.path} takes only {method}", method)
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kinds and not any(kind.startswith(one) if one.endswith("/") else kind == one for one in kinds):
            wanted = " or ".join("image/…" if one == "image/" else one for one in kinds)
            raise Refused(415, f"the Content-Type must be {wanted}, not {kind or 'missing'}")

    def body(self, most: int) -> bytes:
        """The body of the request. Raises Refused when it is longer than `most` bytes, before any of it is read."""
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers or not lengths:
            raise Refused(411, "the request needs a Content-Length, and no Transfer-Encoding")
        if len(lengths) > 1 or not re.fullmatch(r"[0-9]{1,18}", lengths[0]):
            raise Refused(400, "the Content-Length is not a number")
        length = int(lengths[0])
        if length > most:
            raise Refused(413, f"the request has {length} bytes; {most} are taken at most")
        data = self.rfile.read(length)
        if len(data) < length:
            raise Refused(400, f"the request ends after {len(data)} of {length} bytes")
        return data

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers {"error": message}. The base class calls it for requests that it cannot parse."""
        body, kind = as_json({"error": message or HTTPStatus(code).phrase})
        self.answer(code, body, kind)

    def answer(self, status: int, body: bytes, kind: str, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        """Sends the whole answer, then ends the connection so that it arrives even where a body was not read."""
        self.connection.settimeout(_SECONDS)
        self.send_response(status)
        own = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close"}
        for name, value in {**_HEADERS, **own, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")
        self.drain()

    def drain(self) -> None:
        """Reads and drops a little of what the client still sends: closing at once would reset the connection, and the
        client might lose the answer."""
        try:
            self.connection.shutdown(socket.SHUT_WR)
            ends, left = time.monotonic() + _DRAIN_SECONDS, _DRAINED
            while left > 0 and (seconds := ends - time.monotonic()) > 0:
                self.connection.settimeout(seconds)
                if not (read := len(self.connection.recv(1 << 16))):
                    break
                left -= read
        except OSError:
            pass

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing: the terminal is for what the user has to know."""


def print_traceback() -> None:
    """Prints what was raised, as a bug to be seen. What it says may come from a data set, or from a client."""
    print(printable(traceback.format_exc(), lines=True), file=sys.stderr)


def as_json(content: Any) -> tuple[bytes, str]:
    """The body and the type of an answer in JSON."""
    return json.dumps(content).encode(), _JSON


def parsed(data: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises Refused."""
    try:
        content = foreign.parse_json(data)
    except ValueError as error:
        raise Refused(400, "the request is not JSON") from error
    if not isinstance(content, dict):
        raise Refused(400, "the request is not a JSON object")
    return content


def small_enough(image: bytes) -> bytes:
    """The encoded image. Raises Refused for one that is none, or is of more than MOST_PIXELS; decodes nothing."""
    try:
        header = read_header(image)
    except BadSample as error:
        raise Refused(413 if error.cause == "too large" else 400, f"the image cannot be read ({error})") from error
    if header.width * header.height > MOST_PIXELS:
        raise Refused(
            413,
            f"the image has {header.width} x {header.height} pixels; {MOST_PIXELS // 10**6} million are taken at most",
        )
    return image
