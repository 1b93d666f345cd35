"""What comes from strangers: wrong files, wrong lines, archives that attack; each is refused with its reason."""

import io
import json
import zipfile

import pytest
from sqlalchemy import text
from storage_lab import answered_study, everything, last, picture_bytes

from storage import exchange, labels
from storage.exchange import ExchangeError


@pytest.fixture
def study(store):
    return answered_study(store)


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.parquet", b"PAR1 no", "not a readable parquet"),
        ("a.zip", b"PK\x03\x04 no", "of no known kind"),
        ("a.txt", b"hello", "of no known kind"),
        ("missing.zip", None, "There is no file"),
    ],
)
def test_wrong_files_get_a_sentence(other, tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ExchangeError, match=sentence):
        last(exchange.import_data(other, tmp_path / name))


def archive(path, lines, files=(), study=None):
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("pairs.jsonl", "".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
        for name, data in files:
            out.writestr(name, data)
        if study is not None:
            out.writestr("study.json", study if isinstance(study, str) else json.dumps(study))
    return path


GOOD = [("a.png", picture_bytes(1)), ("b.png", picture_bytes(2))]
LINE = {"prompt": "a cat", "first": "a.png", "second": "b.png"}


def test_simple_lines_are_taken(other, tmp_path):
    lines = [
        {**LINE, "choice": "tie", "annotator": "Ben"},
        {**LINE, "prompt": "a dog", "target": 1},
        {**LINE, "prompt": "a cow", "target": 0.25},
        {**LINE, "prompt": "a hen"},
        {**LINE, "prompt": "a pig", "choice": "both_bad", "annotator": "robot", "simulated": True},
    ]
    path = archive(tmp_path / "mine.zip", lines, GOOD)
    state = last(exchange.import_data(other, path))
    assert (state["pairs"], state["labels"], state["unlabelled"]) == (4, 3, 1)
    assert state["rejected"] == {"target is not 1, 0.5 or 0: a soft label has no single annotator": 1}
    assert labels.get_study(other, state["study_id"]).name == "mine"
    assert {(who.name, who.kind) for who in labels.list_annotators(other)} == {
        ("Ben", "human"), ("import mine", "human"), ("robot", "simulated"),
    }  # fmt: skip
    (tmp_path / "flat").mkdir()
    for name, data in GOOD:
        (tmp_path / "flat" / name).write_bytes(data)
    (tmp_path / "flat" / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = last(exchange.import_data(other, tmp_path / "flat" / "mine.jsonl"))
    assert (again["pairs"], again["labels"], again["duplicates"]) == (0, 0, 4)


def test_a_training_snapshot_can_be_imported_only_from_inside(store, study, other, tmp_path):
    """pairs.jsonl of a run has absolute paths: they lead outside, and are counted."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in labels.training_pairs(store, study.id)))
    state = last(exchange.import_data(other, path))
    assert state["rejected"] == {"a picture's path leads outside of the import": 3}


def test_paths_never_leave_the_import(other, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture_bytes(9))
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for name, data in GOOD:
        (folder / name).write_bytes(data)
    (folder / "link.png").symlink_to(secret)
    names = ["../secret.png", str(secret), "sub/../../secret.png", "link.png", "..\\secret.png", "a.png\x00", "sub", ""]
    lines = [{**LINE, "prompt": name or "x", "second": name} for name in names]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = last(exchange.import_data(other, folder))
    assert state["pairs"] == 0 and sum(state["rejected"].values()) == len(names)
    assert [path for path in other.media.root.rglob("*") if path.is_file()] == []

    link = zipfile.ZipInfo("link.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16  # a symbolic link, as Unix packs it
    outside = [("../secret.png", b"x"), ("/etc/evil.png", b"x"), (link, str(secret))]
    packed = archive(tmp_path / "evil.zip", lines, [*GOOD, *outside])
    before = sorted(tmp_path.rglob("*"))
    state = last(exchange.import_data(other, packed))
    assert state["pairs"] == 0
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and "other" not in path.parts] == []


@pytest.mark.parametrize(
    "line, reason",
    [
        ("not json", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", "no prompt"),
        ({**LINE, "prompt": ""}, "A prompt has 1 to 2000"),
        ({**LINE, "prompt": "x" * 3000}, "A prompt has 1 to 2000"),
        ('{"prompt": "\\ud800", "first": "a.png", "second": "b.png"}', "half of a character"),
        ({"prompt": "a cat"}, "does not name both"),
        ({**LINE, "first": ["a.png"]}, "does not name both"),
        ({**LINE, "first": "gone.png"}, "a picture is missing"),
        ({**LINE, "first": "bomb.png"}, "megapixels"),
        ({**LINE, "first": "text.png"}, "not a readable"),
        ({**LINE, "first": "huge.png"}, "larger than 1 MB"),
        ({**LINE, "second": "a.png"}, "the same file"),
        ({**LINE, "first_provenance": "me"}, "provenance"),
        ({**LINE, "first_provenance": {"x": "y" * 30000}}, "provenance"),
        ({**LINE, "labels": "first"}, "not a list"),
        ({**LINE, "labels": [{"choice": "first"}]}, "no annotator or no client key"),
        ({**LINE, "target": [1]}, "target is not"),
        ({**LINE, "target": True}, "target is not"),
        ('{"prompt": "' + "x" * (5 * 2**20) + '"}', "longer than 4 MB"),
    ],
)
def test_bad_lines_are_counted_with_their_reason(other, tmp_path, line, reason, monkeypatch):
    from test_storage_media import png

    monkeypatch.setattr("storage.exchange.files.MAX_BYTES", 2**20)
    files = [*GOOD, ("bomb.png", png(60000, 60000)), ("text.png", b"hello"), ("huge.png", b"\0" * 2**21)]
    path = archive(tmp_path / "a.zip", [{**LINE, "prompt": "before"}, line, {**LINE, "prompt": "after"}], files)
    state = last(exchange.import_data(other, path))
    assert state["pairs"] == 2
    ((found, times),) = state["rejected"].items()
    assert reason in found and times == 1


def label(**wrong) -> dict:
    return {"annotator": "Ben", "choice": "first", "client_key": "k", "created_at": 5.0, **wrong}


@pytest.mark.parametrize(
    "bad",
    [
        label(choice="best"), label(choice=None), label(choice=["first"]), label(left="up"), label(milliseconds=-1),
        label(milliseconds="5"), label(created_at=float("nan")), label(created_at=-1), label(annotator=""),
        label(annotator=5), label(annotator="\ud800"), label(client_key=""), label(client_key="x" * 300),
        label(kind="robot"), label(revokes="nowhere"), label(revokes=7), label(choice=None, revokes="nowhere"),
    ],
)  # fmt: skip
def test_bad_labels_are_counted_and_the_pair_is_kept(other, tmp_path, bad):
    path = archive(tmp_path / "a.zip", [{**LINE, "labels": [bad, label(client_key="good")]}], GOOD)
    state = last(exchange.import_data(other, path))
    assert (state["pairs"], state["labels"]) == (1, 1)
    ((reason, times),) = state["rejected"].items()
    assert reason.startswith("label: ") and times == 1


def test_an_import_cannot_undo_labels_of_other_pairs(store, study, tmp_path):
    victim = everything(store, study.id)[0]
    with store.reader() as session:
        key = session.execute(text("SELECT client_key FROM preference WHERE id = :i"), {"i": victim["id"]}).scalar()
    before = labels.effective(store, study.id)
    evil = label(choice=None, revokes=key, annotator="Eve")
    path = archive(tmp_path / "a.zip", [{**LINE, "labels": [evil]}], GOOD)
    state = last(exchange.import_data(store, path, study_id=study.id))
    assert state["labels"] == 0 and labels.effective(store, study.id) == before


def test_a_human_and_a_program_of_one_name_stay_apart(store, study, tmp_path):
    path = archive(tmp_path / "a.zip", [{**LINE, "labels": [label(annotator="Anna", kind="simulated")]}], GOOD)
    last(exchange.import_data(store, path, study_id=study.id))
    found = {who.name: who.kind for who in labels.list_annotators(store)}
    assert found["Anna"] == "human" and found["Anna (simulated)"] == "simulated"
    assert [row["simulated"] for row in labels.effective(store, study.id) if row["choice"] == "first"][-1]


@pytest.mark.parametrize(
    "about, sentence",
    [
        ({"format": "preference-lab", "format_version": 99, "name": "x"}, "update Preference Lab"),
        ({"format": "preference-lab", "format_version": "1"}, "update Preference Lab"),
        ({"format": "other"}, "not written by Preference Lab"),
        ({"format": "preference-lab", "format_version": 1, "name": 5}, "as texts"),
        ("[", "cannot be read"),
        ("[" * 10**5, "cannot be read"),
    ],
)
def test_a_bad_study_file_is_refused(other, tmp_path, about, sentence):
    path = archive(tmp_path / "a.zip", [LINE], GOOD, study=about)
    with pytest.raises(ExchangeError, match=sentence):
        last(exchange.import_data(other, path))
    assert labels.list_studies(other) == []


def test_damaged_and_empty_archives(other, tmp_path):
    path = archive(tmp_path / "a.zip", [LINE], GOOD)
    data = bytearray(path.read_bytes())
    place = data.index(b"\x89PNG")
    data[place + 20 : place + 40] = b"\0" * 20
    path.write_bytes(data)
    state = last(exchange.import_data(other, path))
    assert state["rejected"] == {"a file in the archive is damaged": 1}
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(ExchangeError, match=r"no pairs\.jsonl"):
        last(exchange.import_data(other, tmp_path / "empty.zip"))
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("pairs.jsonl", json.dumps(LINE) + "\n")
        out.writestr("a.png", b"\0" * (200 * 2**20))
        out.writestr("b.png", picture_bytes(1))
    (tmp_path / "bomb.zip").write_bytes(bomb.getvalue())
    state = last(exchange.import_data(other, tmp_path / "bomb.zip"))
    assert state["rejected"] == {"a picture is larger than 32 MB": 1}


def test_a_zip_with_too_many_files_is_refused_before_its_contents_are_read(other, tmp_path, monkeypatch):
    monkeypatch.setattr("storage.exchange.files.MOST_CONTENTS", 500)
    for bits in (32, 64):
        path = tmp_path / f"{bits}.zip"
        with zipfile.ZipFile(path, "w") as out:
            monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2**16 if bits == 32 else 5)
            for number in range(12):
                out.writestr(f"{number}.png", b"x")
        with pytest.raises(ExchangeError, match=r"has more files than can be read from one zip \(about 400,000\)"):
            last(exchange.import_data(other, path))
