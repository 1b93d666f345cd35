"""Who may talk to the page: signed cookies, the password, the Host and Origin checks, and the security headers.

The page has no users, only one optional password. Everything, the mounted Gradio app and its websockets included,
goes through `Guard`, a plain ASGI middleware, because Gradio's own login guards only Gradio's own routes.
"""

import base64
import hashlib
import hmac
import json
import os
import secrets
import time
from pathlib import Path
from urllib.parse import urlsplit

ANNOTATOR_COOKIE = "preference_lab_annotator"
LOGIN_COOKIE = "preference_lab_login"
YEAR = 365 * 24 * 3600
LOGIN_SECONDS = 30 * 24 * 3600


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
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(32))
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
