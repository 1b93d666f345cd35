"""Studies and what they ask: annotators, prompts with their split, pairs and their place in the queue."""

import hashlib
import secrets
import unicodedata
from collections.abc import Iterable

from sqlalchemy import func
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, select

from .db import Storage, StorageError
from .models import Annotator, Pair, Picture, Prompt, Study, StudyPair, StudyPrompt

REPEAT_BLOCK = 20  # one pair of every 20 comes twice: 5 %


class LabelError(StorageError):
    """A label, study or annotator that cannot be taken, in one sentence."""


def normalise(text: str) -> str:
    """The text that decides the split: NFKC, casefold, single spaces, no full stop at the end."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).removesuffix(".").rstrip()


def keyed_uniform(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts only: blake2b of the parts joined by newlines."""
    digest = hashlib.blake2b("\n".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split_of(text: str, salt: str, heldout: float = 0.2) -> str:
    """ "heldout" for the prompts whose hash with the study's salt falls below `heldout`, otherwise "train"."""
    return "heldout" if keyed_uniform(salt, normalise(text)) < heldout else "train"


def annotator(store: Storage, name: str, kind: str = "human") -> Annotator:
    """The annotator of this name, made on first use. A name never changes between human and simulated."""
    name = " ".join(name.split())
    if not 1 <= len(name) <= 80:
        raise LabelError("A name has 1 to 80 characters; choose another one.")
    with store.session() as session:
        row = session.exec(select(Annotator).where(Annotator.name == name)).first()
        if row is None:
            row = Annotator(name=name, kind=kind)
            session.add(row)
        elif row.kind != kind:
            raise LabelError(f"The name {name!r} belongs to a {row.kind} annotator; choose another one.")
    return row


def get_annotator(store: Storage, annotator_id: int) -> Annotator | None:
    with store.reader() as session:
        return session.get(Annotator, annotator_id)


def list_annotators(store: Storage) -> list[Annotator]:
    with store.reader() as session:
        return list(session.exec(select(Annotator).order_by(Annotator.id)))


def create_study(
    store: Storage,
    name: str,
    base: str = "scenes",
    question: str = "Which picture do you prefer?",
    salt: str | None = None,
    settings: dict | None = None,
) -> Study:
    """A new study. Without a salt it gets a random one, except on Scenes, whose salt is "scenes": the embedded models
    were never trained on what that salt holds out."""
    name = " ".join(name.split())
    if not 1 <= len(name) <= 120:
        raise LabelError("A study's name has 1 to 120 characters; choose another one.")
    if salt is None:
        salt = "scenes" if base == "scenes" else secrets.token_hex(8)
    row = Study(name=name, base=base, question=question, salt=salt, settings=settings or {})
    try:
        with store.session() as session:
            session.add(row)
    except IntegrityError as error:
        raise LabelError(f"There is already a study named {name!r}; choose another name.") from error
    return row


def list_studies(store: Storage) -> list[Study]:
    with store.reader() as session:
        return list(session.exec(select(Study).order_by(Study.id)))


def get_study(store: Storage, study_id: int) -> Study:
    with store.reader() as session:
        return study_row(session, study_id)


def study_row(session: Session, study_id: int) -> Study:
    row = session.get(Study, study_id)
    if row is None:
        raise LabelError(f"There is no study {study_id} in this lab; choose another one.")
    return row


def add_prompts(store: Storage, study_id: int, texts: Iterable[str]) -> list[Prompt]:
    """The prompts of these texts, in order, as members of the study; known ones are found again. A thousand take a
    tenth of a second: rows are read and written in bulk."""
    cleaned = [_prompt_text(text) for text in texts]
    with store.session() as session:
        study = study_row(session, study_id)
        known: dict[str, Prompt] = {}
        for start in range(0, len(cleaned), 500):  # SQLite bounds the number of variables
            part = cleaned[start : start + 500]
            known |= {row.text: row for row in session.exec(select(Prompt).where(Prompt.text.in_(part)))}
        new = {text: Prompt(text=text, key=normalise(text)) for text in cleaned if text not in known}
        session.add_all(new.values())
        session.flush()
        rows = [known.get(text) or new[text] for text in cleaned]
        members = set(session.exec(select(StudyPrompt.prompt_id).where(StudyPrompt.study_id == study.id)))
        fresh = {row.id: row for row in rows if row.id not in members}
        session.add_all(
            StudyPrompt(study_id=study.id, prompt_id=row.id, split=split_of(row.text, study.salt))
            for row in fresh.values()
        )
    return rows


def add_prompt(session: Session, study: Study, text: str) -> Prompt:
    """One prompt inside the caller's write transaction."""
    text = _prompt_text(text)
    row = session.exec(select(Prompt).where(Prompt.text == text)).first()
    if row is None:
        row = Prompt(text=text, key=normalise(text))
        session.add(row)
        session.flush()
    if session.get(StudyPrompt, (study.id, row.id)) is None:
        session.add(StudyPrompt(study_id=study.id, prompt_id=row.id, split=split_of(text, study.salt)))
    return row


def _prompt_text(text: str) -> str:
    text = " ".join(text.split())
    if not 1 <= len(text) <= 2000:
        raise LabelError("A prompt has 1 to 2000 characters; shorten it or leave it out.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise LabelError("A prompt holds half of a character that UTF-8 cannot write; type it again.")
    return text


def study_prompts(store: Storage, study_id: int, split: str | None = None) -> list[Prompt]:
    """The study's prompts, in the order in which they came; `split` is "train", "heldout" or None for all."""
    with store.reader() as session:
        query = select(Prompt).join(StudyPrompt).where(StudyPrompt.study_id == study_id).order_by(Prompt.id)
        return list(session.exec(query if split is None else query.where(StudyPrompt.split == split)))


def has_prompts(store: Storage, study_id: int, split: str) -> bool:
    """Whether the study has any prompt of a split, without reading them."""
    with store.reader() as session:
        query = select(StudyPrompt).where(StudyPrompt.study_id == study_id, StudyPrompt.split == split)
        return session.exec(query.limit(1)).first() is not None


def add_pair(store: Storage, study_id: int | None, prompt_id: int, first_id: int, second_id: int, origin: str) -> Pair:
    """The pair of these two pictures, put at the end of the study's queue. The same two pictures are one pair, so
    `first_id` of what comes back may be the picture given as second. `origin` is e.g. "queue", "form", "import"."""
    if origin == "comparison":
        raise LabelError("Pairs of a comparison are made by add_comparison_pairs.")
    with store.session() as session:
        return insert_pair(session, study_id, prompt_id, first_id, second_id, origin)


def pair_key(prompt_id: int, first_hash: str, second_hash: str) -> str:
    return hashlib.sha256("\n".join([str(prompt_id), *sorted((first_hash, second_hash))]).encode()).hexdigest()[:32]


def insert_pair(
    session: Session, study_id: int | None, prompt_id: int, first_id: int, second_id: int, origin: str
) -> Pair:
    """add_pair inside the caller's write transaction."""
    first, second = session.get(Picture, first_id), session.get(Picture, second_id)
    if first is None or second is None or session.get(Prompt, prompt_id) is None:
        raise LabelError("A pair needs a prompt and two pictures that the lab has.")
    if first.hash == second.hash:
        raise LabelError("Both pictures of the pair are the same file; a pair needs two different ones.")
    key = pair_key(prompt_id, first.hash, second.hash)
    row = session.exec(select(Pair).where(Pair.key == key, Pair.origin != "comparison")).first()
    if row is None:
        row = Pair(prompt_id=prompt_id, first_id=first_id, second_id=second_id, origin=origin, key=key)
        session.add(row)
        session.flush()
    if study_id is not None:
        enqueue(session, study_row(session, study_id), row)
    return row


def enqueue(session: Session, study: Study, pair: Pair) -> None:
    """Put the pair (and its prompt) into the study, at the end of the queue, unless it is there."""
    if session.get(StudyPair, (study.id, pair.id)) is not None:
        return
    if session.get(StudyPrompt, (study.id, pair.prompt_id)) is None:
        prompt = session.get(Prompt, pair.prompt_id)
        session.add(StudyPrompt(study_id=study.id, prompt_id=prompt.id, split=split_of(prompt.text, study.salt)))
    last = session.exec(select(func.max(StudyPair.position)).where(StudyPair.study_id == study.id)).one()
    position = 0 if last is None else last + 1
    block, place = divmod(position, REPEAT_BLOCK)
    repeat = place == int(keyed_uniform(study.salt, "repeat", block) * REPEAT_BLOCK)
    session.add(StudyPair(study_id=study.id, pair_id=pair.id, position=position, repeat=repeat))
    session.flush()
