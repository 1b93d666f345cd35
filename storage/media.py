"""Pictures as files by content hash: media/ab/cdef....png. A file is written once, whole, or not at all.

Whatever comes in is treated as hostile: only PNG, JPEG and WebP, bounded in bytes and in pixels before anything is
decoded, then decoded completely once, so that what is stored can be shown and trained on later.
"""

import hashlib
import io
import json
import os
import re
import struct
import tempfile
import threading
import warnings
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from sqlmodel import select

from .db import StorageError
from .models import Picture

if TYPE_CHECKING:
    from .db import Storage

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 32 * 10**6
MIN_SIDE = 8
# decoding 32 megapixels takes up to 500 MB for a moment (WebP), so large pictures take turns
LARGE_PIXELS = 4 * 10**6
_LARGE_TURN = threading.Lock()
_LARGEST = f"at most {MAX_PIXELS // 10**6} megapixels are allowed."
ENDINGS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
_HASH = re.compile(r"[0-9a-f]{64}")
# what Pillow's decoders raise on broken files
_CORRUPT = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)


class MediaError(StorageError):
    """A picture that cannot be taken, in one sentence."""


def check_picture(data: bytes, name: str = "The picture") -> tuple[str, int, int]:
    """The ending, width and height of a picture that was decoded completely; raises MediaError."""
    if len(data) > MAX_BYTES:
        raise MediaError(f"{name} has {len(data) / 2**20:.0f} MB; at most {MAX_BYTES // 2**20} MB are allowed.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit, just below, is stricter
            with Image.open(io.BytesIO(data), formats=tuple(ENDINGS)) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise MediaError(f"{name} has {width} x {height} pixels; {_LARGEST}")
                if min(width, height) < MIN_SIDE:
                    raise MediaError(f"{name} has {width} x {height} pixels; each side needs at least {MIN_SIDE}.")
                if getattr(image, "n_frames", 1) != 1:
                    raise MediaError(f"{name} is an animation; only still pictures are allowed.")
                with _LARGE_TURN if width * height > LARGE_PIXELS else nullcontext():
                    image.load()
                return ENDINGS[image.format], width, height
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        raise MediaError(f"{name} has far too many pixels; {_LARGEST}") from error
    except _CORRUPT as error:
        raise MediaError(f"{name} is not a readable PNG, JPEG or WebP picture; save it again as PNG.") from error


class Media:
    """The folder of pictures; knows nothing of the database."""

    def __init__(self, root: Path):
        self.root = root

    def path(self, digest: str) -> Path:
        """Where the picture with this sha256 lies; raises MediaError if the name is malformed or nothing is there."""
        if not _HASH.fullmatch(digest):
            raise MediaError("A picture is named by 64 hexadecimal digits.")
        stem = self.root / digest[:2] / digest[2:]
        for ending in MEDIA_TYPES:
            path = stem.with_suffix(ending)
            if path.exists():
                return path
        raise MediaError(f"The picture {digest[:12]}… is not in {self.root}; restore the media folder from a backup.")

    def put(self, data: bytes, name: str = "The picture") -> tuple[str, int, int]:
        """Check and store; returns (hash, width, height). The same bytes are stored once."""
        ending, width, height = check_picture(data, name)
        digest = hashlib.sha256(data).hexdigest()
        self.keep(digest, ending, data)
        return digest, width, height

    def keep(self, digest: str, ending: str, data: bytes) -> None:
        """Store a checked picture, unless it is there: only what `check_picture` has passed may come here."""
        target = (self.root / digest[:2] / digest[2:]).with_suffix(ending)
        if not (target.exists() and target.stat().st_size == len(data)):
            write_atomically(target, data)

    def put_image(self, image: Image.Image) -> tuple[str, int, int]:
        """Store a PIL picture as PNG without any metadata (a file must not tell which policy made it)."""
        buffer = io.BytesIO()
        bare = image.convert("RGB")
        bare.info = {}
        bare.save(buffer, "PNG", compress_level=6)
        return self.put(buffer.getvalue())


def write_atomically(target: Path, data: bytes) -> None:
    """Write, fsync, rename, fsync the folder: after a crash the file is there whole or absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def add_picture(
    store: "Storage",
    picture: bytes | Image.Image,
    *,
    prompt_id: int | None = None,
    provenance: dict,
    name: str = "The picture",
) -> Picture:
    """Store the file, then its row; the same file of the same prompt and provenance gets one row only.

    `provenance` is {policy, scheduler, steps, guidance_scale, eta, seed} or {"imported": where from}.
    """
    if isinstance(picture, Image.Image):
        digest, width, height = store.media.put_image(picture)
    else:
        digest, width, height = store.media.put(picture, name)
    wanted = json.dumps(provenance, sort_keys=True)
    with store.session() as session:
        for row in session.exec(select(Picture).where(Picture.hash == digest, Picture.prompt_id == prompt_id)):
            if json.dumps(row.provenance, sort_keys=True) == wanted:
                return row
        row = Picture(hash=digest, width=width, height=height, prompt_id=prompt_id, provenance=provenance)
        session.add(row)
    return row
