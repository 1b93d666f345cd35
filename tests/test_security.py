"""Cookies, the password, Host and Origin: what the guard lets through and what it does not."""

import os
import stat

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from app import security
from app.security import Guard, Limiter, Signer, is_loopback, same_origin

HTML = {"accept": "text/html"}
SOCKET = "ws://127.0.0.1:7860/mounted/ws"


@pytest.fixture
def signer(tmp_path):
    return Signer(tmp_path)


async def talk(websocket):
    await websocket.accept()
    await websocket.send_text("hello")
    await websocket.close()


def client(signer, password=None, base="http://127.0.0.1:7860", address="testclient") -> TestClient:
    def hello(request):
        return PlainTextResponse("hello")

    methods = ["GET", "POST", "PUT", "DELETE"]
    inner = Starlette(routes=[Route("/deep", hello, methods=methods), WebSocketRoute("/ws", talk)])
    app = Starlette(routes=[Route("/", hello, methods=methods), Mount("/mounted", inner)])
    return TestClient(
        Guard(app, signer, password), base_url=base, follow_redirects=False, client=(address, 1), cookies={}
    )


def test_a_signed_value_comes_back_and_nothing_else_does(signer, tmp_path):
    cookie = signer.sign("Ada ☕")
    assert signer.read(cookie) == "Ada ☕"
    assert Signer(tmp_path).read(cookie) == "Ada ☕", "the key outlives the process"
    assert Signer(tmp_path / "other").read(cookie) is None
    for forged in (None, "", ".", "x.y", cookie[:-1], cookie + "A", "A" + cookie, cookie.split(".")[0], "é.é"):
        assert signer.read(forged) is None
    assert signer.read(cookie, "login") is None, "a cookie for one purpose is none for another"
    assert signer.read(signer.sign("Ada", seconds=-1)) is None, "it has expired"


def test_the_key_is_for_its_owner_only(tmp_path):
    Signer(tmp_path)
    assert stat.S_IMODE((tmp_path / "cookie.key").stat().st_mode) == 0o600


@pytest.mark.parametrize("left", [b"", b"short", b"x" * 31])
def test_a_key_that_was_cut_short_is_no_key(tmp_path, left):
    key = tmp_path / "cookie.key"
    key.write_bytes(left)
    key.chmod(0o644)
    (tmp_path / f"cookie.{os.getpid()}").write_bytes(b"of a crash")
    guessed = Signer.__new__(Signer)
    guessed._key = left
    signer = Signer(tmp_path)
    assert signer.read(guessed.sign("Ada")) is None
    assert Signer(tmp_path).read(signer.sign("Ada")) == "Ada"
    assert len(key.read_bytes()) == 32 and stat.S_IMODE(key.stat().st_mode) == 0o600
    assert sorted(tmp_path.iterdir()) == [key]


@pytest.mark.parametrize(
    ("headers", "ours"),
    [
        ({"host": "localhost:1", "origin": "http://localhost:1"}, True),
        ({"host": "localhost:1"}, True),
        ({"host": "localhost:1", "sec-fetch-site": "same-origin"}, True),
        ({"host": "localhost:1", "origin": "http://localhost:2"}, False),
        ({"host": "localhost:1", "origin": "http://evil.example"}, False),
        ({"host": "localhost:1", "origin": "null"}, False),
        ({"host": "localhost:1", "sec-fetch-site": "cross-site"}, False),
        ({"host": "localhost:1", "sec-fetch-site": "same-site"}, False),
    ],
)
def test_same_origin(headers, ours):
    assert same_origin(headers) is ours


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "example.com", "localhost.evil.example", "")))


def test_another_name_for_this_machine_is_refused_without_a_password(signer):
    """DNS rebinding: a page of evil.example whose name suddenly means 127.0.0.1."""
    assert client(signer).get("/").status_code == 200
    assert client(signer, base="http://localhost:7860").get("/mounted/deep").status_code == 200
    for base in ("http://evil.example", "http://192.168.1.2:7860"):
        answer = client(signer, base=base).get("/mounted/deep")
        assert answer.status_code == 400 and "hello" not in answer.text


def test_unsafe_requests_from_other_pages_are_refused(signer):
    ours, evil = {"origin": "http://127.0.0.1:7860"}, {"origin": "http://evil.example"}
    for path in ("/", "/mounted/deep"):
        for method in ("POST", "PUT", "DELETE"):
            assert client(signer).request(method, path, headers=ours).status_code == 200
            assert client(signer).request(method, path, headers=evil).status_code == 403
        assert client(signer).get(path, headers=evil).status_code == 200, "reading is guarded by the browser itself"
    with pytest.raises(WebSocketDisconnect), client(signer).websocket_connect(SOCKET, headers=evil):
        pass
    with client(signer).websocket_connect(SOCKET, headers=ours) as websocket:
        assert websocket.receive_text() == "hello"


def test_the_password_guards_everything(signer):
    for path in ("/", "/mounted/deep", "/healthz", "/media/x", "/gradio_api/queue/join", "/login/../"):
        answer = client(signer, "secret").get(path)
        assert answer.status_code == 401 and answer.json()["error"]
        page = client(signer, "secret").get(path, headers=HTML)
        assert (page.status_code, page.headers["location"]) == (303, "/login")
    with pytest.raises(WebSocketDisconnect), client(signer, "secret").websocket_connect("/mounted/ws"):
        pass


def test_logging_in(signer):
    browser = client(signer, "secret", base="http://192.168.1.2:7860")
    asked = browser.get("/login").text
    assert 'type="password"' in asked
    assert 'rel="icon"' in asked  # else the browser asks for one, is refused, and says so in its console
    wrong = browser.post("/login", data={"password": "<script>"})
    assert wrong.status_code == 401 and "<script>" not in wrong.text and "set-cookie" not in wrong.headers
    right = browser.post("/login", data={"password": "secret"})
    assert (right.status_code, right.headers["location"]) == (303, "/")
    cookie = right.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=lax" in cookie and "secret" not in cookie
    assert browser.get("/mounted/deep").text == "hello"
    changed = client(signer, "other", base="http://192.168.1.2:7860")
    changed.cookies = browser.cookies
    assert changed.get("/").status_code == 401, "another password asks again"
    annotator = client(signer, "secret")
    annotator.cookies.set(security.LOGIN_COOKIE, signer.sign("in"))
    assert annotator.get("/").status_code == 401, "an annotator's cookie is no login"


def test_a_login_from_another_page_or_too_long_is_refused(signer):
    browser = client(signer, "secret")
    headers = {"origin": "http://evil.example"}
    assert browser.post("/login", data={"password": "secret"}, headers=headers).status_code == 403
    assert browser.post("/login", data={"password": "x" * 10_000}).status_code == 413


def test_guessing_is_slowed_down(signer, monkeypatch):
    browser = client(signer, "secret")
    for _ in range(5):
        assert browser.post("/login", data={"password": "guess"}).status_code == 401
    assert browser.post("/login", data={"password": "secret"}).status_code == 429
    now = security.time.monotonic()
    monkeypatch.setattr(security.time, "monotonic", lambda: now + 61)
    assert browser.post("/login", data={"password": "secret"}).status_code == 303


def test_guessing_from_many_addresses_is_slowed_down_too():
    limiter = Limiter(per_address=5, overall=20)
    for n in range(20):
        assert not limiter.blocked(f"10.0.0.{n}")
        limiter.failed(f"10.0.0.{n}")
    assert limiter.blocked("10.0.0.99")


def test_every_answer_has_the_security_headers(signer):
    for answer in (client(signer).get("/"), client(signer, "x").get("/"), client(signer, "x").get("/login")):
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
