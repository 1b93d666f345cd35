"""Pictures out of parquet pages of any size: what the page reader says against pyarrow, which writes and reads them."""

import contextlib
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.exchange import ExchangeError, pages, parquet_in

LIMIT = 50_000


def _values(draw: random.Random) -> list[bytes | None]:
    """Noise, repeats (for dictionaries and copies), empty and missing values."""
    repeated = [draw.randbytes(700), bytes(range(256)) * 9, b"", b"a" * 3000]
    made = [draw.choice([None, draw.randbytes(draw.randrange(5000)), draw.choice(repeated)]) for _ in range(300)]
    return [*made, draw.randbytes(40_000), b"xyz" * 16_000]


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd", "brotli"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_every_value_as_pyarrow_reads_it(tmp_path, codec, version, dictionary):
    wanted = _values(random.Random(codec + version))
    wrapped = [None if each is None else {"bytes": each, "path": "x"} for each in wanted]
    plain = pa.array(wanted, pa.binary())
    table = pa.table({"plain": plain, "wrapped": wrapped, "needed": [each or b"" for each in wanted]})
    table = table.cast(table.schema.set(2, pa.field("needed", pa.binary(), nullable=False)))
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, compression=codec, data_page_version=version, use_dictionary=dictionary,
                   data_page_size=30_000, write_batch_size=10, row_group_size=200)  # fmt: skip
    parquet = pq.ParquetFile(path)
    for place, name in enumerate(("plain", "wrapped.bytes", "wrapped.path", "needed")):
        if name == "wrapped.path":
            continue
        depth, got = parquet.schema.column(place).max_definition_level, []
        for group in range(parquet.metadata.num_row_groups):
            got += pages.values(path, parquet.metadata.row_group(group).column(place), depth, LIMIT)
        assert got == ([each or b"" for each in wanted] if name == "needed" else wanted), name


def test_a_value_over_the_limit_is_cut_and_the_next_one_is_whole(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"x": [b"a" * 300_000, b"next"]}), path, compression="snappy")
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    assert list(pages.values(path, chunk, 1, LIMIT)) == [b"a" * (LIMIT + 1), b"next"]


def test_damaged_pages_raise_what_is_promised(tmp_path):
    draw, path = random.Random(1), tmp_path / "x.parquet"
    for codec in ("none", "snappy", "gzip", "zstd", "brotli"):
        pq.write_table(pa.table({"x": [draw.randbytes(200) for _ in range(40)]}), path, compression=codec)
        good, chunk = path.read_bytes(), pq.ParquetFile(path).metadata.row_group(0).column(0)
        for _ in range(60):
            bad = bytearray(good)
            for _ in range(3):
                bad[draw.randrange(4, 8000)] = draw.randrange(256)
            path.write_bytes(bad)
            with contextlib.suppress(pages.BROKEN):
                list(pages.values(path, chunk, 1, LIMIT))


def test_an_import_reads_large_pages_as_small_ones_and_goes_on_anywhere(tmp_path, monkeypatch):
    draw = random.Random(2)
    rows = [
        {"caption": f"prompt {n}", "jpg_0": draw.randbytes(900), "jpg_1": {"bytes": draw.randbytes(900), "path": "x"},
         "label_0": 1.0, "label_1": 0.0} for n in range(30)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=12)
    source = parquet_in.Source(tmp_path / "x.parquet")
    wanted = list(source.items())
    monkeypatch.setattr(parquet_in, "LARGE", 4000)
    monkeypatch.setattr(parquet_in, "MAX_BYTES", 1000)
    for skip in (0, 5, 12, 17):
        assert list(source.items(skip)) == wanted[skip:]
    assert [item.first for item in wanted] == [row["jpg_0"] for row in rows]
    monkeypatch.setattr(parquet_in, "MAX_BYTES", 800)
    assert {str(item) for item in source.items()} == {"a picture is larger than 0 MB"}
    delta = {"use_dictionary": False, "column_encoding": {"jpg_0": "DELTA_LENGTH_BYTE_ARRAY"}}
    for written, words in ({"compression": "lz4"}, "LZ4 compression"), (delta, "the encoding DELTA_LENGTH_BYTE_ARRAY"):
        healthy = pa.table({**{name: [row[name] for row in rows] for name in rows[0]}, "jpg_1": [b"x" * 900] * 30})
        pq.write_table(healthy, tmp_path / "healthy.parquet", **written)
        with pytest.raises(ExchangeError, match=f"healthy.parquet has {words} in pages of more than 0 MB, which is"):
            list(parquet_in.Source(tmp_path / "healthy.parquet").items())
    monkeypatch.setattr(parquet_in, "TEXTS", 100)
    with pytest.raises(ExchangeError, match="beside its pictures; at most 0 MB are read"):
        list(source.items())
