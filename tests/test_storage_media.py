"""Files: pictures of friends and of attackers, traces on a budget, checkpoints and settings."""

import hashlib
import io
import os
import struct
import time
import zlib

import pytest
from PIL import Image, PngImagePlugin
from storage_lab import picture_bytes

from storage import StorageError, checkpoints, media, traces
from storage.media import MediaError, check_picture


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG that claims a size; `body` is its compressed pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def animation() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (0, 200)]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "GIF")
    return buffer.getvalue()


@pytest.mark.parametrize("ending, suffix", [("PNG", ".png"), ("JPEG", ".jpg"), ("WEBP", ".webp")])
def test_pictures_lie_under_their_content_hash(store, ending, suffix):
    data = picture_bytes(3, ending=ending)
    digest, width, height = store.media.put(data)
    assert digest == hashlib.sha256(data).hexdigest() and (width, height) == (16, 16)
    path = store.media.path(digest)
    assert path == store.media.root / digest[:2] / f"{digest[2:]}{suffix}" and path.read_bytes() == data
    written = path.stat().st_mtime_ns
    assert store.media.put(data)[0] == digest and path.stat().st_mtime_ns == written
    assert not list(store.media.root.rglob(".new-*"))


@pytest.mark.parametrize(
    "data, sentence",
    [
        (b"", "not a readable"),
        (b"hello", "not a readable"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "not a readable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable"),
        (gif(), "not a readable"),
        (picture_bytes(1)[:-30], "not a readable"),
        (picture_bytes(1)[:60] + b"\x00\xff" * 20, "not a readable"),
        (picture_bytes(1, ending="JPEG")[:200], "not a readable"),
        (png(16, 16, b"not zlib"), "not a readable"),
        (png(60000, 60000, zlib.compress(b"\0" * 10**6)), "megapixels"),
        (png(6000, 6000, zlib.compress(b"\0" * 10**6)), "megapixels"),
        (png(10**9, 10**9), "megapixels"),
        (png(2, 2, zlib.compress(b"\0" * 14)), "at least 8"),
        (animation(), "animation"),
    ],
)
def test_bad_pictures_get_one_sentence_and_leave_no_file(store, data, sentence):
    with pytest.raises(MediaError, match=sentence) as refused:
        store.media.put(data, "cat.png")
    assert "\n" not in str(refused.value) and "cat.png" in str(refused.value)
    assert [path for path in store.media.root.rglob("*") if path.is_file()] == []


def test_large_files_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(media, "MAX_BYTES", 1000)
    with pytest.raises(MediaError, match="at most"):
        check_picture(b"\x89PNG" + b"\0" * 2000)


@pytest.mark.parametrize("name", ["../../etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "/..", "%2e%2e", "", "g" * 64])
def test_malformed_names_never_reach_the_disk(store, name):
    with pytest.raises(MediaError, match="64 hexadecimal digits"):
        store.media.path(name)


def test_a_missing_file_gets_a_sentence(store):
    with pytest.raises(MediaError, match="restore the media folder"):
        store.media.path("a" * 64)


def test_a_truncated_file_is_written_anew(store):
    data = picture_bytes(5)
    digest, *_ = store.media.put(data)
    store.media.path(digest).write_bytes(data[:20])
    store.media.put(data)
    assert store.media.path(digest).read_bytes() == data


def test_made_pictures_carry_no_metadata(store):
    image = Image.open(io.BytesIO(picture_bytes(1)))
    told = PngImagePlugin.PngInfo()
    told.add_text("parameters", "adapter secret")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=told)
    with_text = Image.open(io.BytesIO(buffer.getvalue()))
    with_text.load()
    digest, *_ = store.media.put_image(with_text)
    assert b"secret" not in store.media.path(digest).read_bytes()


# --- traces


def trace(store, name: str, size: int = 1000, **more):
    path = store.traces_dir / f"{name}.safetensors"
    path.write_bytes(b"\0" * size)
    given = {"prompt": "p", "seed": 0, "policy": {}, "config": {}, **more}
    return traces.add_trace(store, key=name, path=path, **given)


def test_traces_are_found_scored_and_replaced(store):
    row = trace(store, "a")
    assert (row.bytes, row.path) == (1000, "a.safetensors")
    traces.save_scores(store, row.id, "lrm-1", [1.0, 2.0])
    traces.save_scores(store, row.id, "lrm-2", [3.0])
    traces.save_scores(store, row.id, "lrm-2", [4.0])
    assert traces.scores_of(store, row.id) == {"lrm-1": [1.0, 2.0], "lrm-2": [4.0]}
    assert traces.find_trace(store, "a").used_at >= row.used_at
    assert traces.find_trace(store, "b") is None
    assert trace(store, "a", seed=1).id == row.id and traces.scores_of(store, row.id) == {}
    traces.trace_path(store, row).unlink()
    assert traces.find_trace(store, "a") is None


def test_the_least_recently_used_traces_give_way(store):
    made = {name: trace(store, name) for name in "abcd"}
    traces.save_scores(store, made["b"].id, "lrm", [1.0])
    time.sleep(0.01)
    traces.find_trace(store, "a")
    gone = traces.evict(store, budget=2500, keep=[made["c"].id])
    assert {row.key for row in gone} == {"b", "d"}
    assert {path.name for path in store.traces_dir.iterdir()} == {"a.safetensors", "c.safetensors"}
    assert traces.scores_of(store, made["b"].id) == {}
    with pytest.raises(StorageError, match="sample it again"):
        traces.save_scores(store, made["b"].id, "lrm", [1.0])
    assert traces.evict(store, budget=2500) == []


def test_traces_lie_in_their_folder_and_strangers_are_swept(store, tmp_path):
    with pytest.raises(StorageError, match="lies under"):
        traces.add_trace(store, key="x", path=tmp_path / "x", prompt="p", seed=0, policy={}, config={})
    trace(store, "kept")
    old, new = store.traces_dir / "old", store.traces_dir / "new"
    for stranger in (old, new):
        stranger.write_bytes(b"x")
    os.utime(old, (1, 1))
    os.utime(store.traces_dir / "kept.safetensors", (1, 1))
    assert traces.sweep(store) == 1
    assert not old.exists() and new.exists() and (store.traces_dir / "kept.safetensors").exists()


# --- checkpoints and settings


def test_checkpoints_are_listed_hidden_and_updated(store):
    base = checkpoints.add_checkpoint(store, kind="lrm", name="warm", path="x")
    child = checkpoints.add_checkpoint(store, kind="adapter", name="A", path="y", parent_id=base.id, step=40)
    assert [row.id for row in checkpoints.list_checkpoints(store)] == [child.id, base.id]
    assert [row.id for row in checkpoints.list_checkpoints(store, kind="lrm")] == [base.id]
    again = checkpoints.add_checkpoint(store, kind="adapter", name="B", path="y", meta={"judge": 0.9})
    assert (again.id, again.name, again.meta) == (child.id, "B", {"judge": 0.9})
    checkpoints.hide_checkpoint(store, child.id)
    assert [row.id for row in checkpoints.list_checkpoints(store)] == [base.id]
    assert len(checkpoints.list_checkpoints(store, include_hidden=True)) == 2
    with pytest.raises(StorageError, match="allowed are base, adapter, lrm"):
        checkpoints.add_checkpoint(store, kind="lora", name="A", path="z")
    with pytest.raises(StorageError, match="no checkpoint 99"):
        checkpoints.get_checkpoint(store, 99)


def test_settings(store):
    assert checkpoints.get_setting(store, "study", 1) == 1
    for value in (3, {"a": [1]}, "text", None):
        checkpoints.set_setting(store, "study", value)
        assert checkpoints.get_setting(store, "study", 1) == value
