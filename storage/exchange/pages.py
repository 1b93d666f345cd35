"""Reading a column of pictures from parquet one value at a time, however large its pages are.

pyarrow holds a whole page, compressed and not, and writers put up to 1,024 pictures into one: gigabytes. Here a page is
a stream: memory holds one value and some blocks of 64 KB. Only what columns of bytes need is read: no lists, plain and
dictionary encoding.
Source: the Parquet format (apache/parquet-format: parquet.thrift, Encodings.md) and snappy's format_description.txt.
"""

import io
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

BLOCK = 2**16  # a snappy copy never reaches further back: every known compressor works in blocks of this size
DICTIONARY, DATA, DATA_V2 = 2, 0, 3
PLAIN, INDICES = 0, (2, 8)
ENCODINGS = {5: "DELTA_BINARY_PACKED", 6: "DELTA_LENGTH_BYTE_ARRAY", 7: "DELTA_BYTE_ARRAY", 9: "BYTE_STREAM_SPLIT"}
STREAMED = ("UNCOMPRESSED", "SNAPPY", "GZIP", "ZSTD", "BROTLI")
BROKEN = (pa.ArrowException, OSError, EOFError, ValueError, LookupError, zlib.error)  # what a damaged page raises


class NotRead(Exception):
    """What is not read here though the file is whole: a compression or encoding of large pages."""


@dataclass(frozen=True)
class Page:
    """Where a page lies in the file and what its header says."""

    start: int
    kind: int
    size: int  # uncompressed, as the header claims
    compressed: int
    values: int
    encoding: int
    levels: int | None  # bytes of definition levels before the compressed part (version 2 only)
    packed: bool


def pages(file: io.BufferedReader, chunk: pq.ColumnChunkMetaData) -> Iterator[Page]:
    """The pages of a column chunk, from their headers alone."""
    place = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        place = min(place, chunk.dictionary_page_offset)
    end = place + chunk.total_compressed_size
    while place < end:
        file.seek(place)
        header = _struct(file)
        kind, size, compressed = header[1], header[2], header[3]
        about = header.get({DATA: 5, DICTIONARY: 7, DATA_V2: 8}.get(kind), {})
        if not isinstance(about, dict):
            raise ValueError("a page header of an unknown kind")
        version_2 = kind == DATA_V2
        if min(size, compressed, about.get(1, 0)) < 0:
            raise ValueError("a page of negative size")
        yield Page(
            file.tell(), kind, size, compressed, about.get(1, 0), about.get(4 if version_2 else 2, PLAIN),
            about[5] if version_2 else None, about.get(7, True) if version_2 else True,
        )  # fmt: skip
        place = file.tell() + compressed


def values(path: Path, chunk: pq.ColumnChunkMetaData, depth: int, limit: int) -> Iterator[bytes | None]:
    """The values of a column of bytes, None for a missing one; of one longer than `limit` its first limit + 1 bytes.
    `depth` is the column's maximum definition level. Raises NotRead, or one of BROKEN where the file is damaged."""
    with path.open("rb") as file, path.open("rb") as heads, tempfile.TemporaryFile() as spool:
        known = array("Q", [0])  # where each entry of the dictionary ends in `spool`
        for page in pages(heads, chunk):
            if page.kind == DICTIONARY:
                if page.values > chunk.num_values:
                    raise ValueError("a dictionary with more entries than the column has rows")
                read = _stream(file, page, chunk.compression, 0)
                for _ in range(page.values):
                    known.append(known[-1] + spool.write(_value(read, limit)))
            elif page.kind in (DATA, DATA_V2):
                yield from _page(file, page, chunk.compression, depth, limit, spool, known)


def _page(file, page: Page, codec: str, depth: int, limit: int, spool, known: array) -> Iterator[bytes | None]:
    # definition levels say which values are missing; version 2 keeps them in front of the compressed part
    front = page.levels or 0
    file.seek(page.start)
    levels = file.read(min(front, _most_levels(page)))
    read = _stream(file, page, codec if page.packed else "UNCOMPRESSED", front)
    if depth and page.levels is None:
        levels = read(min(int.from_bytes(read(4), "little"), _most_levels(page)))
    defined = _runs(io.BytesIO(levels).read, depth.bit_length()) if depth else iter(lambda: depth, None)
    if page.encoding not in (PLAIN, *INDICES):
        name = ENCODINGS.get(page.encoding)
        if name is None:
            raise ValueError(f"there is no encoding {page.encoding}")
        raise NotRead(f"the encoding {name}")
    numbers: Iterator[int] | None = None
    for level in islice(defined, page.values):
        if level < depth:
            yield None
        elif page.encoding == PLAIN:
            yield _value(read, limit)
        else:
            numbers = numbers or _runs(read, read(1)[0])
            entry = next(numbers)
            spool.seek(known[entry])
            yield spool.read(known[entry + 1] - known[entry])


def _most_levels(page: Page) -> int:
    """More bytes than the levels of a page can need, whatever it claims."""
    return 8 * page.values + 64


def _value(read: Callable[[int], bytes], limit: int) -> bytes:
    length = int.from_bytes(read(4), "little")
    value = read(min(length, limit + 1))
    rest = length - len(value)
    while rest > 0:
        rest -= len(read(min(rest, BLOCK)))
    return value


def _runs(read: Callable[[int], bytes], width: int) -> Iterator[int]:
    """The hybrid of repeated and bit-packed numbers of `width` bits."""
    while True:
        head = _varint(read)
        if head & 1:
            for _ in range(head >> 1):
                packed = int.from_bytes(read(width), "little")
                yield from ((packed >> width * place) & ((1 << width) - 1) for place in range(8))
        else:
            value = int.from_bytes(read((width + 7) // 8), "little")
            for _ in range(head >> 1):
                yield value


def _stream(file: io.BufferedReader, page: Page, codec: str, skip: int) -> Callable[[int], bytes]:
    """read(n) of a page's uncompressed bytes behind the first `skip` ones: exactly n, or EOFError."""
    file.seek(page.start + skip)
    left = page.compressed - skip

    def raw(wanted: int) -> bytes:
        nonlocal left
        data = file.read(min(wanted, left))
        left -= len(data)
        return data

    if codec == "UNCOMPRESSED":
        blocks = iter(lambda: raw(BLOCK), b"")
    elif codec == "SNAPPY":
        blocks = _snappy(_exactly(iter(lambda: raw(BLOCK), b"")))
    elif codec == "GZIP":
        blocks = _gzip(raw)
    elif codec in STREAMED:
        source = pa.CompressedInputStream(pa.PythonFile(_Raw(raw), mode="r"), codec.lower())
        blocks = iter(lambda: source.read(BLOCK), b"")
    else:
        raise NotRead(f"{codec} compression")
    return _exactly(blocks)


class _Raw(io.RawIOBase):
    """What pyarrow takes for a file."""

    def __init__(self, raw: Callable[[int], bytes]):
        self.raw = raw

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self.raw(BLOCK if size < 0 else size)


def _exactly(blocks: Iterator[bytes]) -> Callable[[int], bytes]:
    buffer, place = b"", 0

    def read(wanted: int) -> bytes:
        nonlocal buffer, place
        if place + wanted <= len(buffer):
            place += wanted
            return buffer[place - wanted : place]
        parts, missing = [buffer[place:]], wanted - len(buffer) + place
        while missing > 0:
            buffer = next(blocks, b"")
            if not buffer:
                raise EOFError("the page ends too early")
            parts.append(buffer[:missing])
            place = len(parts[-1])
            missing -= place
        return b"".join(parts)

    return read


def _gzip(raw: Callable[[int], bytes]) -> Iterator[bytes]:
    stream = zlib.decompressobj(wbits=31)
    data = raw(BLOCK)
    while data:
        yield from filter(None, (stream.decompress(data, BLOCK),))
        data = stream.unconsumed_tail or raw(BLOCK)


def _snappy(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """Raw snappy, about 64 KB at a time: literals, and copies from the last 64 KB."""
    total, window = _varint(read), bytearray()
    while total > 0:
        tag = read(1)[0]
        kind, length = tag & 3, (tag >> 2) + 1
        if kind == 0:
            if length > 60:
                length = int.from_bytes(read(length - 60), "little") + 1
            total -= length
            while length > BLOCK:
                window += read(BLOCK)
                length -= BLOCK
                yield bytes(window[:-BLOCK])
                del window[:-BLOCK]
            window += read(length)
        else:
            if kind == 1:
                length, offset = (tag >> 2 & 7) + 4, (tag >> 5 << 8) | read(1)[0]
            else:
                offset = int.from_bytes(read(2 * kind - 2), "little")
            if not 0 < offset <= min(len(window), BLOCK):
                raise ValueError("a snappy copy from outside of its block")
            total -= length
            piece = window[-offset:]
            window += (piece * (length // offset + 1))[:length]
        if len(window) > 2 * BLOCK:
            yield bytes(window[:-BLOCK])
            del window[:-BLOCK]
    yield bytes(window)


def _varint(read: Callable[[int], bytes]) -> int:
    value = shift = 0
    while shift < 64:
        byte = (read(1) or b"\0")[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value
        shift += 7
    raise ValueError("a number of more than 64 bits")


def _struct(file: io.BufferedReader, depth: int = 0) -> dict[int, object]:
    """A struct of Thrift's compact protocol as {field: value}; texts are skipped, lists have no use here."""
    if depth > 8:
        raise ValueError("a page header that is nested too deeply")
    found, field = {}, 0
    while head := file.read(1)[0]:
        delta, kind = head >> 4, head & 15
        field = field + delta if delta else _zigzag(file)
        if kind in (1, 2):
            found[field] = kind == 1
        elif kind in (4, 5, 6):
            found[field] = _zigzag(file)
        elif kind == 8:
            file.seek(_varint(file.read), io.SEEK_CUR)
        elif kind == 12:
            found[field] = _struct(file, depth + 1)
        else:
            raise ValueError("a page header of an unknown kind")
    return found


def _zigzag(file: io.BufferedReader) -> int:
    value = _varint(file.read)
    return (value >> 1) ^ -(value & 1)
