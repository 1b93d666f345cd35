"""An import's view of a folder or a zip archive: only members that a listing names are read, whole and bounded, and
none of them is ever unpacked under its own name."""

import hashlib
import lzma
import zipfile
import zlib
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import IO

from ..media import MAX_BYTES
from .items import ExchangeError, Rejected

DAMAGED = (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError, zlib.error, lzma.LZMAError)
EDGE = 2**16
MOST_PICTURES = 400_000  # in a zip: its table of contents is held in memory, 0.7 KB each
MOST_CONTENTS = 48 * 2**20  # bytes of that table in the file; 400,000 of our names have 46 MB


class Files:
    """The members of a zip, or the files below a folder, under the names that they have there."""

    def __init__(self, path: Path):
        self.path = path
        self.zip: zipfile.ZipFile | None = None
        self.root = path.resolve()
        if path.is_file():
            if _contents(path) > MOST_CONTENTS:
                raise ExchangeError(
                    f"{path.name} has more files than can be read from one zip (about {MOST_PICTURES:,}); unpack it "
                    "and import the folder."
                )
            try:
                self.zip = zipfile.ZipFile(path)
            except DAMAGED as error:
                raise ExchangeError(f"{path.name} is a damaged zip archive ({error}); export it again.") from error

    def close(self) -> None:
        if self.zip is not None:
            self.zip.close()

    def exists(self, name: str) -> bool:
        if self.zip is not None:
            return name in self.zip.NameToInfo
        try:
            path = (self.root / name).resolve()
            return path.is_file() and path.is_relative_to(self.root)  # a link may not lead out either
        except OSError:
            return False

    def top(self, ending: str) -> list[str]:
        """The names at the top that end so, sorted."""
        if self.zip is not None:
            return sorted(name for name in self.zip.NameToInfo if "/" not in name and name.endswith(ending))
        return sorted(path.name for path in self.root.glob(f"*{ending}") if path.is_file())

    def open(self, name: str) -> IO[bytes]:
        try:
            # buffered: a zip member's own readline(limit) may stop before both the limit and the end of the line
            return BufferedReader(self.zip.open(name)) if self.zip is not None else (self.root / name).open("rb")
        except DAMAGED as error:  # RuntimeError: encrypted
            raise ExchangeError(f"{name} in {self.path.name} cannot be read ({error}); export it again.") from error

    def read(self, name: str, limit: int) -> bytes:
        """At most limit + 1 bytes: what a member claims about its size is not believed. Raises Rejected."""
        try:
            with self.open(name) as file:
                return file.read(limit + 1)
        except (ExchangeError, *DAMAGED) as error:
            raise Rejected("a file in the archive is damaged") from error

    def picture(self, name: object, folders: tuple[str, ...] = ("",)) -> bytes:
        """The bytes of a picture named in a listing, looked for in these folders; raises Rejected."""
        if not isinstance(name, str) or not name:
            raise Rejected("the line does not name both pictures")
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or "\\" in name or "\x00" in name:
            raise Rejected("a picture's path leads outside of the import")
        found = next((folder + name for folder in folders if self.exists(folder + name)), None)
        if found is None:
            raise Rejected("a picture is missing")
        data = self.read(found, MAX_BYTES)
        if len(data) > MAX_BYTES:
            raise Rejected(f"a picture is larger than {MAX_BYTES // 2**20} MB")
        return data


def _contents(path: Path) -> int:
    """Bytes of a zip's table of contents as its end record says, which is what `zipfile` reads at once."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - EDGE - 42))
        tail = file.read()
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or len(tail) < at + 22:
            return 0  # no zip: zipfile says so
        size = int.from_bytes(tail[at + 12 : at + 16], "little")
        if at >= 20 and tail[at - 20 : at - 16] == b"PK\x06\x07":  # zip64: the real size is in another record
            file.seek(int.from_bytes(tail[at - 12 : at - 4], "little"))
            size = int.from_bytes(file.read(56)[40:48], "little")
        return size


def fingerprint(paths: list[Path]) -> str:
    """Names these files by their names, sizes, first and last bytes: a resumed import knows its source again without
    reading all of it."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.name}\n{size}\n".encode() + file.read(EDGE))
            file.seek(max(0, size - EDGE))
            digest.update(file.read(EDGE))
    return digest.hexdigest()
