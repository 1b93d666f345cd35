"""Who may talk to the page: signed cookies, the password, the Host and Origin checks, and the security headers.

The page has no users, only one optional password. Everything, the mounted Gradio app and its websockets included,
goes through `Guard`, a plain ASGI middleware, because Gradio's own login guards only Gradio's own routes.
"""

import base64
import hashlib
import hmac
import html
import ipaddress
import json
import os
import secrets
import time
from collections import deque
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

ANNOTATOR_COOKIE = "preference_lab_annotator"
LOGIN_COOKIE = "preference_lab_login"
YEAR = 365 * 24 * 3600
KEY_BYTES = 32
LOGIN_SECONDS = 30 * 24 * 3600
LOGIN_PATH = "/login"

# 'unsafe-inline' and 'unsafe-eval' are what Gradio's own page needs; everything else comes from this server only.
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

LOGIN_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Preference Lab</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>body{font:16px system-ui,sans-serif;display:grid;place-items:center;min-height:90vh;margin:0;color:#1e293b}
form{display:grid;gap:.8rem;width:min(20rem,88vw)} input,button{font:inherit;padding:.6rem;border-radius:.4rem;
border:1px solid #94a3b8} button{background:#4f46e5;color:#fff;border:0} p{color:#b91c1c;margin:0;min-height:1.2em}
</style><form method="post" action="/login"><h1>Preference Lab</h1>
<label for="password">Password</label><input id="password" name="password" type="password" autofocus required>
<button>Log in</button><p role="alert">{message}</p></form></html>"""


class Signer:
    """Signs short texts with a key kept in the data folder (mode 0600), so that cookies outlive a restart."""

    def __init__(self, data_dir: Path):
        self._key = _read_or_make_key(data_dir / "cookie.key")

    def sign(self, value: str, purpose: str = "annotator", seconds: int = YEAR) -> str:
        """A cookie text that carries `value`. A cookie signed for one purpose is not accepted for another."""
        payload = _encode(json.dumps([value, int(time.time()) + seconds]).encode())
        return f"{payload}.{self._mac(payload, purpose)}"

    def read(self, cookie: str | None, purpose: str = "annotator") -> str | None:
        """The value that `sign` put in, or None if the cookie is missing, forged, too old or of another purpose."""
        payload, _, mac = (cookie or "").partition(".")
        if not hmac.compare_digest(mac.encode(), self._mac(payload, purpose).encode()):
            return None
        value, expires = json.loads(base64.urlsafe_b64decode(payload))
        return value if time.time() < expires else None

    def _mac(self, payload: str, purpose: str) -> str:
        return _encode(hmac.new(self._key, f"{purpose}\n{payload}".encode(), hashlib.sha256).digest())


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode()


def _read_or_make_key(path: Path) -> bytes:
    """A key that is empty or cut short, as after a crash while it was written, would let anybody forge a name: such a
    one is replaced, and every browser asked for name and password anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and len(key := path.read_bytes()) == KEY_BYTES:
        return key
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(secrets.token_bytes(KEY_BYTES))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path.read_bytes()


def same_origin(headers: dict[str, str]) -> bool:
    """Whether a request that changes something came from our own page.

    `headers` has lower-case names. Browsers send Origin with every POST; a request without one (curl, a script)
    carries no ambient cookie of a victim's browser unless Sec-Fetch-Site says otherwise.
    """
    if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        return False
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")


def annotator_name(lab, request) -> str | None:
    """The name in the request's annotator cookie (a Starlette request), or None if none was chosen."""
    return lab.signer.read(request.cookies.get(ANNOTATOR_COOKIE))


def set_annotator(lab, request, response, name: str) -> None:
    """Lets `response` carry the signed HttpOnly cookie with the annotator's name."""
    response.set_cookie(
        ANNOTATOR_COOKIE,
        lab.signer.sign(name),
        max_age=YEAR,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )


def is_loopback(host: str) -> bool:
    """Whether `host` (a name or an address, no port) is this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Limiter:
    """Counts wrong passwords: at most `per_address` a minute from one address and `overall` a minute in all."""

    def __init__(self, per_address: int = 5, overall: int = 60):
        self._limits = (per_address, overall)
        self._failures: deque[tuple[float, str]] = deque()

    def blocked(self, address: str) -> bool:
        """Whether `address` must wait before its next try."""
        while self._failures and self._failures[0][0] < time.monotonic() - 60:
            self._failures.popleft()
        own = sum(1 for _, other in self._failures if other == address)
        return own >= self._limits[0] or len(self._failures) >= self._limits[1]

    def failed(self, address: str) -> None:
        """Notes a wrong password."""
        self._failures.append((time.monotonic(), address))


class Guard:
    """ASGI middleware in front of everything: Host, Origin, password, then the security headers on every answer."""

    def __init__(self, app, signer: Signer, password: str | None):
        self.app = app
        self.signer = signer
        self.password = password
        self.limiter = Limiter()
        self._login_purpose = f"login {password}"  # so another password asks every browser to log in again

    async def __call__(self, scope, receive, send):
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = await self._refusal(scope, receive)
        if refusal is None:
            await self.app(scope, receive, send_with_headers)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await refusal(scope, receive, send_with_headers)

    async def _refusal(self, scope, receive) -> Response | None:
        """What to answer instead of the application; None lets the request through."""
        request = HTTPConnection(scope)
        method = scope.get("method", "GET")
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        # Without a password only this machine may ask, under its own names: a page elsewhere that points its own
        # domain at 127.0.0.1 (DNS rebinding) is stopped here. With a password its browser has no login cookie.
        if self.password is None and not is_loopback(host):
            return _plain(f"This address is not served here ({host}). Open http://localhost on this machine.", 400)
        unsafe = method not in ("GET", "HEAD", "OPTIONS") or scope["type"] == "websocket"
        if unsafe and not same_origin(dict(request.headers)):
            return _plain("This request came from another page. Open the lab's own page and try again.", 403)
        if self.password is None:
            return None
        if scope["path"] == LOGIN_PATH and scope["type"] == "http":
            return await self._login(Request(scope, receive)) if method == "POST" else _login_page()
        if self.signer.read(request.cookies.get(LOGIN_COOKIE), self._login_purpose) is not None:
            return None
        if "text/html" in request.headers.get("accept", ""):
            return RedirectResponse(LOGIN_PATH, status_code=303)
        return _plain("Log in on the lab's page first.", 401)

    async def _login(self, request: Request) -> Response:
        address = request.client.host if request.client else ""
        if self.limiter.blocked(address):
            return _login_page("Too many wrong passwords. Wait a minute and try again.", 429)
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > 4096:
                return _login_page("That is too long for a password.", 413)
        given = parse_qs(body.decode("utf-8", "replace")).get("password", [""])[0]
        # Digests have one length, so the comparison's time says nothing about the password's.
        digests = [hashlib.sha256(text.encode()).digest() for text in (given, self.password)]
        if not hmac.compare_digest(*digests):
            self.limiter.failed(address)
            return _login_page("That is not the password. It is the one given to --password.", 401)
        response = RedirectResponse("/", status_code=303)
        response.set_cookie(
            LOGIN_COOKIE,
            self.signer.sign("in", self._login_purpose, LOGIN_SECONDS),
            max_age=LOGIN_SECONDS,
            httponly=True,
            samesite="lax",
            secure=request.url.scheme == "https",
        )
        return response


def _plain(text: str, status: int) -> Response:
    return JSONResponse({"error": text}, status_code=status)


def _login_page(message: str = "", status: int = 200) -> Response:
    page = LOGIN_PAGE.replace("{message}", html.escape(message))
    return HTMLResponse(page, status_code=status, headers={"Cache-Control": "no-store"})
