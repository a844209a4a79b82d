"""An HTTP proxy that does to chosen requests what networks and object stores do."""

import http.client
import socket
import struct
import threading
from collections import deque
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit

ERRORS = {
    "403": "AccessDenied", "404": "NoSuchKey", "429": "TooManyRequests", "500": "InternalError", "503": "SlowDown"
}  # fmt: skip
BODY_FAULTS = ("reset", "stall", "truncate", "short", "flip", "slow")


class Request(NamedTuple):
    """What was asked for."""

    method: str
    path: str
    range: str | None


class FaultProxy:
    """Passes requests on to `upstream`, but for those that `add` has a fault for. `requests`: all that came.

    Faults: a status of ERRORS; of an answer's body, half of which is sent: reset (RST), stall (nothing more until
    the proxy closes), truncate (the connection ends before Content-Length), short (Content-Length says half, too);
    flip (one bit changed), slow (in 10 pieces, 0.02 s apart). `refuse`: the connection closes without an answer.
    """

    def __init__(self, upstream: str):
        self.upstream = urlsplit(upstream)
        self.requests: list[Request] = []
        self.faults: dict[tuple[str, str], deque[str]] = {}
        self.ignores_ranges = False
        self.closed = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"proxy": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def add(self, ending: str, *faults: str, method: str = "GET") -> None:
        """The next requests of the method for a path that ends so meet these faults, one each; "" is none."""
        self.faults.setdefault((method, ending), deque()).extend(faults)

    def take(self, request: Request) -> str:
        self.requests.append(request)
        path = urlsplit(request.path).path
        for (method, ending), faults in self.faults.items():
            if method == request.method and path.endswith(ending) and faults:
                return faults.popleft()
        return ""

    def asked(self, ending: str, method: str = "GET") -> list[Request]:
        """The requests of the method for a path that ends so."""
        return [r for r in self.requests if r.method == method and urlsplit(r.path).path.endswith(ending)]

    def close(self) -> None:
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def answer(self) -> None:
        fault = self.proxy.take(Request(self.command, self.path, self.headers.get("Range")))
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length) if length else None
        if fault == "refuse":
            self.close_connection = True
            return
        if fault in ERRORS:
            text = f"<Error><Code>{ERRORS[fault]}</Code><Message>injected</Message></Error>".encode()
            self.begin(int(fault), {"Content-Type": "application/xml"}, len(text))
            if self.command != "HEAD":
                self.wfile.write(text)
            return
        assert fault in ("", *BODY_FAULTS), fault
        upstream = http.client.HTTPConnection(self.proxy.upstream.netloc)
        try:
            headers = dict(self.headers.items())
            if self.proxy.ignores_ranges:
                headers.pop("Range", None)
            upstream.request(self.command, self.path, body, headers)
            response = upstream.getresponse()
            content = response.read()
            headers = {k: v for k, v in response.getheaders() if k.lower() not in DROPPED}
            said = response.getheader("Content-Length") if self.command == "HEAD" else None
        finally:
            upstream.close()
        half = len(content) // 2
        if fault == "flip":
            content = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        self.begin(response.status, headers, int(said or (half if fault == "short" else len(content))))
        if self.command != "HEAD":
            self.send_body(content, fault)

    def send_body(self, content: bytes, fault: str) -> None:
        if fault in ("", "flip"):
            self.wfile.write(content)
        elif fault == "slow":
            for i in range(10):
                self.wfile.write(content[len(content) * i // 10 : len(content) * (i + 1) // 10])
                self.proxy.closed.wait(0.02)
        else:
            self.wfile.write(content[: len(content) // 2])
            if fault == "stall":
                self.proxy.closed.wait(30)
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            self.close_connection = fault != "short"

    def begin(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def finish(self) -> None:
        with suppress(OSError, ValueError):  # the client or a fault has closed it
            super().finish()

    def handle(self) -> None:
        with suppress(OSError, ValueError):
            super().handle()

    do_GET = do_HEAD = do_PUT = do_POST = answer


DROPPED = {"content-length", "transfer-encoding", "connection", "server", "date"}
