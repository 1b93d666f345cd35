"""Small labs for the storage tests: pictures of one colour, pairs, and annotators that answer."""

import io
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from storage import browse, labels, media
from storage.browse import Filters
from storage.models import Pair, Picture, Study
from storage.studies import insert_pair


def picture_bytes(number: int, size: int = 16, ending: str = "PNG") -> bytes:
    """A picture whose bytes depend on `number` only."""
    image = Image.new("RGB", (size, size), (number % 256, number // 256 % 256, 40))
    image.putpixel((0, 0), (255, 255, number // 65536))
    buffer = io.BytesIO()
    image.save(buffer, ending)
    return buffer.getvalue()


def add_pairs(store, study, count: int, prompts: int = 5) -> list[Pair]:
    """`count` pairs over `prompts` prompts with real files; picture numbers 2i and 2i + 1."""
    known = labels.add_prompts(store, study.id, [f"prompt number {number}" for number in range(prompts)])
    pairs = []
    for number in range(count):
        prompt = known[number % prompts]
        sides = [
            media.add_picture(
                store,
                picture_bytes(2 * number + side),
                prompt_id=prompt.id,
                provenance={"policy": "scenes", "seed": side},
            )
            for side in (0, 1)
        ]
        pairs.append(labels.add_pair(store, study.id, prompt.id, sides[0].id, sides[1].id, "queue"))
    return pairs


def add_rows(store, study, count: int, prompts: int = 5) -> list[Pair]:
    """As add_pairs, in one transaction and without files: for tests that look at labels only."""
    known = labels.add_prompts(store, study.id, [f"prompt number {number}" for number in range(prompts)])
    pairs = []
    with store.session() as session:
        for number in range(count):
            sides = [Picture(hash=f"{2 * number + side:064x}", width=16, height=16) for side in (0, 1)]
            session.add_all(sides)
            session.flush()
            prompt = known[number % prompts]
            pairs.append(insert_pair(session, study.id, prompt.id, sides[0].id, sides[1].id, "queue"))
    return pairs


def answer(store, study, who, pair_id: int, choice: str = "first", key: str | None = None, **more):
    """One vote, with a key of its own unless one is given."""
    answer.count += 1
    return labels.vote(
        store,
        study_id=study.id,
        pair_id=pair_id,
        annotator_id=who.id,
        choice=choice,
        left="first",
        milliseconds=900,
        client_key=key or f"key-{answer.count}",
        **more,
    )


answer.count = 0


def everything(store, study_id: int, kind: str = "labels", **more) -> list[dict]:
    """All rows of the Data tab's pictures, pairs or labels of a study."""
    return getattr(browse, kind)(store, Filters(study_id=study_id, **more), 0, 1000)[1]


def last(generator) -> dict:
    """The final report of an import, export or join."""
    *_, state = generator
    assert state["finished"]
    return state


def foreign(number: int, **more) -> dict:
    """A row as Pick-a-Pic itself has it."""
    return {
        "caption": "a cat", "jpg_0": picture_bytes(20 * number, ending="JPEG"),
        "jpg_1": picture_bytes(20 * number + 10, ending="JPEG"), "label_0": 1.0, "label_1": 0.0, "has_label": True,
        "user_id": 7, "ranking_id": number, "model_0": "SDXL", "model_1": "SD2", "image_0_url": "", **more,
    }  # fmt: skip


def write_parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def answered_study(store) -> Study:
    """A study with every kind of answer: changed, undone, skipped, simulated, disagreeing, unanswered pairs."""
    study = labels.create_study(store, "Taste", question="Which?", salt="pepper", settings={"a": 1})
    anna, judge = labels.annotator(store, "Anna"), labels.annotator(store, "judge", "simulated")
    pairs = add_pairs(store, study, 8)
    for pair, choice in zip(pairs, ("first", "second", "tie", "both_bad", "skip", "first"), strict=False):
        answer(store, study, anna, pair.id, choice)
    labels.undo(store, study.id, anna.id, "undo-1")
    first = labels.effective(store, study.id)[0]
    answer(store, study, anna, pairs[0].id, "second", revokes=first["id"])
    for pair in pairs[:3]:
        answer(store, study, judge, pair.id, "first")
    return study


def meaning(store, study_id, history=False):
    """What a study says, without ids."""
    names = {who.id: (who.name, who.kind) for who in labels.list_annotators(store)}
    lines = everything(store, study_id)
    effective = {row["id"] for row in labels.effective(store, study_id)}
    return Counter(
        (row["prompt"], row["first"], row["second"], row["choice"], row["left"], row["seconds"], row["annotator"],
         row["kind"], row["status"] if history else None, round(row["created_at"], 5))
        for row in lines
        if history or row["id"] in effective
    ), set(names.values())  # fmt: skip
