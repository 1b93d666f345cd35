"""Small labs for the storage tests: pictures of one colour, pairs, and annotators that answer."""

import io

from PIL import Image

from storage import browse, labels, media
from storage.browse import Filters
from storage.models import Pair, Picture
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
