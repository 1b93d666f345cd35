"""Reading HPDv2: one JSON array of annotations beside a folder of pictures. Its two layouts, both streamed:

    train   {"prompt", "image_path" (or "file_path"): [a, b], "human_preference": [1, 0]}       1 = preferred
    test    {"prompt", "image_path": [up to nine], "raw_annotations": [{"rank": [...], "user_hash"}]}   0 = best

A ranking of n pictures becomes its n (n - 1) / 2 pairs, each with one label per annotator; equal ranks are ties. All
preferences equal is a tie as well. Pictures are looked for beside the file and in `images/`, `train/` and `test/`.
Source: the dataset card of ymhao/HPDv2 and the evaluation code of HPSv2.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from .files import DAMAGED, Files, fingerprint
from .items import ExchangeError, Item, Label, Rejected

MAX_ENTRY = 4 * 2**20
BLOCK = 2**18
MOST_PICTURES = 64
SPACE = " \t\r\n"
BETWEEN = re.compile(r"[ \t\r\n,]*")


def is_array(files: Files, name: str) -> bool:
    """Whether a JSON file holds an array (annotations) and not lines."""
    with files.open(name) as file:
        return file.read(4096).decode("utf-8-sig", "replace").lstrip(SPACE).startswith("[")


class Source:
    """One .json file beside its pictures, or the .json files at the top of a folder or a zip, in order of name."""

    kind = "hpd"

    def __init__(self, path: Path):
        self.path = path
        single = path.suffix == ".json"
        self.files = Files(path.parent if single else path)
        self.names = [path.name] if single else [n for n in self.files.top(".json") if is_array(self.files, n)]

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_error: object) -> None:
        self.files.close()

    def study(self) -> dict:
        return {"name": self.path.stem or "HPDv2"}

    def fingerprint(self) -> str:
        return fingerprint([self.path / name for name in self.names] if self.path.is_dir() else [self.path])

    def total(self) -> int:
        """Pairs, in one pass over the annotations without opening a picture."""
        return sum(_pairs(entry) for name in self.names for entry in self._entries(name))

    def items(self, skip: int = 0) -> Iterator[Item | Rejected]:
        """One pair after the other, from pair `skip` + 1 on."""
        for name in self.names:
            folders = ("", "images/", f"{name.removesuffix('.json')}/", "train/", "test/")
            for entry in self._entries(name):
                count = _pairs(entry)
                if skip >= count:
                    skip -= count
                    continue
                yield from self._of_entry(entry, folders, skip)
                skip = 0

    def _of_entry(self, entry: object, folders: tuple[str, ...], skip: int) -> Iterator[Item | Rejected]:
        try:
            prompt, paths, opinions = _read(entry)
        except Rejected as reason:
            yield reason
            return
        origin = {"imported": self.path.name}
        for number, (a, b) in enumerate(combinations(range(len(paths)), 2)):
            if number < skip:
                continue
            try:
                pictures = [self.files.picture(paths[place], folders) for place in (a, b)]
                names = (hashlib.sha256(data).hexdigest() for data in pictures)
                labels = _labels(prompt, "\n".join(names), [(who, rank[a], rank[b]) for who, rank in opinions])
                yield Item(prompt, *pictures, {**origin, "file": paths[a]}, {**origin, "file": paths[b]}, labels)
            except Rejected as reason:
                yield reason

    def _entries(self, name: str) -> Iterator[object]:
        """The elements of the array, one at a time; memory holds one element and one block. Raises
        ExchangeError where the JSON is wrong or an element is longer than 4 MB."""
        decoder, text, place, ended = json.JSONDecoder(), "", 0, False
        utf8 = codecs.getincrementaldecoder("utf-8-sig")("replace")
        try:
            with self.files.open(name) as file:
                text = utf8.decode(file.read(BLOCK)).lstrip(SPACE)[1:]
                while True:
                    place = BETWEEN.match(text, place).end()
                    if text.startswith("]", place):
                        return
                    try:
                        entry, place = decoder.raw_decode(text, place)
                        yield entry
                        continue
                    except (ValueError, RecursionError) as error:
                        if ended or len(text) - place > MAX_ENTRY:
                            raise ExchangeError(self._broken(name, "its JSON breaks off or is wrong")) from error
                    text, place = text[place:], 0
                    block = file.read(max(BLOCK, len(text)))
                    ended = not block
                    text += utf8.decode(block, final=ended)
        except DAMAGED as error:
            raise ExchangeError(self._broken(name, str(error))) from error

    def _broken(self, name: str, why: str) -> str:
        return f"{name} is damaged ({why[:100]}); what came before the damage is imported, so download it again."


def _pairs(entry: object) -> int:
    """How many rows an entry counts for: its pairs, or one if it cannot be taken."""
    try:
        count = len(_read(entry)[1])
        return count * (count - 1) // 2
    except Rejected:
        return 1


def _read(entry: object) -> tuple[str, list[str], list[tuple[str | None, list]]]:
    """(prompt, paths, [(annotator or None, ranks: the lower the better)]); raises Rejected."""
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise Rejected("the entry has no prompt")
    paths = entry.get("image_path", entry.get("file_path"))
    if not isinstance(paths, list) or not 2 <= len(paths) <= MOST_PICTURES:
        raise Rejected(f"the entry does not name 2 to {MOST_PICTURES} pictures in image_path")
    if "raw_annotations" in entry:
        listed = entry["raw_annotations"]
        if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
            raise Rejected("raw_annotations is not a list of objects")
        return entry["prompt"], paths, [(each.get("user_hash"), _ranks(each.get("rank"), paths)) for each in listed]
    liked = entry.get("human_preference")
    if liked is None:
        return entry["prompt"], paths, [(None, _ranks(entry["rank"], paths))] if "rank" in entry else []
    return entry["prompt"], paths, [(entry.get("user_hash"), [-x for x in _ranks(liked, paths)])]


def _ranks(ranks: object, paths: list) -> list:
    numbers = isinstance(ranks, list) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in ranks)
    if not numbers or len(ranks) != len(paths):
        raise Rejected("a preference or ranking has not one number for each picture")
    return ranks


def _labels(prompt: str, pictures: str, opinions: list[tuple[str | None, float, float]]) -> list[Label]:
    labels = []
    for number, (who, first, second) in enumerate(opinions):
        choice = "first" if first < second else "second" if second < first else "tie"
        # several anonymous answers to one pair are several answers
        name = f"HPD user {str(who)[:40]}" if who else "HPD" if number == 0 else f"HPD {number + 1}"
        key = hashlib.blake2b("\n".join((prompt, pictures, name)).encode(errors="replace"), digest_size=16).hexdigest()
        labels.append(Label(annotator=name, choice=choice, client_key=f"hpd:{key}"))
    return labels
