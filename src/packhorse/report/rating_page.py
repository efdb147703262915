"""A page for blind ratings, served on this machine only: without scripts, and nobody can post without its token."""

from __future__ import annotations

import hmac
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any, Final
from urllib.parse import parse_qs, quote, urlsplit

from packhorse.evaluate.ratings import CHOICES, BlindRow, RatingSession
from packhorse.report.data_page import environment_of_pages

TEMPLATE: Final = "rating_page.html.jinja"
LOOPBACK: Final = "127.0.0.1"
# A name that an attacker points at this address must not lead to the page (DNS rebinding).
HOSTS: Final = {LOOPBACK, "localhost"}
LARGEST_BODY_BYTES: Final = 10_000
SCORES: Final = {"1", "2", "3", "4", "5"}
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def render_rating_page(session: RatingSession, shown: BlindRow | None, token: str) -> str:
    """Return the page of one row as HTML, or of none if all are rated; all text is escaped."""
    return environment_of_pages().get_template(TEMPLATE).render(session=session, shown=shown, token=token)


class RatingServer(ThreadingHTTPServer):
    """Serves the page of one rater on the loopback address.

    Attributes:
        url: Address with the token, which other users of the machine do not know.
    """

    daemon_threads = True

    def __init__(self, session: RatingSession, port: int = 0) -> None:
        """Listen.

        Args:
            session: Ratings of one person.
            port: Port; 0 takes a free one.

        Raises:
            OSError: The port is in use.
        """
        super().__init__((LOOPBACK, port), _Handler)
        self.session, self.token, self.lock = session, secrets.token_urlsafe(24), Lock()
        self.url = f"http://{LOOPBACK}:{self.server_port}/?token={self.token}"


class _Handler(BaseHTTPRequestHandler):
    server: RatingServer
    timeout = 30

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        if address.path != "/" or not self._may(query):
            return self._send(HTTPStatus.FORBIDDEN, "open the address that the command printed\n", "text/plain")
        with self.server.lock:
            session = self.server.session
            name = query.get("row", [""])[0]
            page = render_rating_page(session, session.blind(name) or session.next(), self.server.token)
        return self._send(HTTPStatus.OK, page, "text/html; charset=utf-8")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST_BODY_BYTES:
            return self._send(HTTPStatus.BAD_REQUEST, "no form\n", "text/plain")
        form = parse_qs(self.rfile.read(int(length)).decode(errors="replace"))
        if not self._may(form):
            return self._send(HTTPStatus.FORBIDDEN, "open the address that the command printed\n", "text/plain")
        with self.server.lock:
            row = _act(self.server.session, {name: values[0] for name, values in form.items()})
        location = f"/?token={self.server.token}" + (f"&row={quote(row)}" if row else "")
        return self._send(HTTPStatus.SEE_OTHER, "", "text/plain", {"Location": location})

    def _may(self, form: dict[str, list[str]]) -> bool:
        given = form.get("token", [""])[0].encode()
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        return hmac.compare_digest(given, self.server.token.encode()) and host in HOSTS

    def _send(self, status: HTTPStatus, text: str, kind: str, headers: dict[str, str] | None = None) -> None:
        content = text.encode()
        self.send_response(status)
        lines = {"Content-Type": kind, "Content-Length": str(len(content)), **HEADERS, **(headers or {})}
        for name, value in lines.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401
        """Print nothing: a line would hold the token."""


def _act(session: RatingSession, form: dict[str, str]) -> str:
    """Do what a form says; return the fingerprint of the row to show next, empty for the next one without a rating."""
    action, row = form.get("action"), session.blind(form.get("row", ""))
    if action == "back":
        last = session.last()
        return last.row.fingerprint if last else ""
    if row is None:
        return ""
    if action == "skip":
        session.skip(row)
    elif session.kind == "choice" and action in CHOICES:
        session.rate(row, *CHOICES[action])
    elif session.kind == "scores" and {form.get("first"), form.get("second")} <= SCORES:
        session.rate(row, float(form["first"]), float(form["second"]))
    else:  # a score is missing
        return row.row.fingerprint
    return ""
