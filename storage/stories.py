"""The story of one pair or picture, and the lab in numbers, for the Data tab. What is in a blind vote stays hidden."""

from pathlib import Path

from sqlalchemy import func, or_
from sqlmodel import select

from .browse import blind_hashes, blind_pair, day, label_row, picture_row, revoked
from .db import Storage, only
from .models import Annotator, Pair, Picture, Preference, Prompt, Study, StudyPrompt

ENOUGH_FILES = 4000  # looked at, to say how large all pictures are


def pair_story(store: Storage, pair_id: int) -> dict | None:
    """Everything known of one pair: {id, prompt, origin, made, splits, first, second, history}; None if it is not
    there or still in a blind vote."""
    with store.reader() as session:
        pair = session.exec(select(Pair).where(Pair.id == pair_id, ~blind_pair(Pair.id))).first()
        if pair is None:
            return None
        prompt = session.get(Prompt, pair.prompt_id)
        query = select(Preference, Annotator, Study).where(Preference.pair_id == pair_id)
        query = query.join(Annotator, Annotator.id == Preference.annotator_id).join(
            Study, Study.id == Preference.study_id
        )
        rows = session.exec(query.order_by(Preference.id)).all()
        gone = revoked(session, [row.id for row, *_ in rows])
        member = select(Study.name, StudyPrompt.split).join(StudyPrompt, StudyPrompt.study_id == Study.id)
        return {
            "id": pair.id,
            "prompt": prompt.text,
            "origin": pair.origin,
            "made": day(pair.created_at),
            "splits": [tuple(row) for row in session.exec(member.where(StudyPrompt.prompt_id == prompt.id))],
            "first": picture_row(session.get(Picture, pair.first_id), prompt),
            "second": picture_row(session.get(Picture, pair.second_id), prompt),
            "history": [label_row(row, who, prompt, study, row.id in gone) for row, who, study in rows],
        }


def picture_story(store: Storage, picture_id: int) -> dict | None:
    """One picture with its provenance and the ids of its pairs; None if it is not there or in a blind vote."""
    with store.reader() as session:
        query = select(Picture).where(Picture.id == picture_id, Picture.hash.not_in(blind_hashes()))
        picture = session.exec(query).first()
        if picture is None:
            return None
        member = or_(Pair.first_id == picture_id, Pair.second_id == picture_id)
        found = session.exec(select(Pair.id).where(member, ~blind_pair(Pair.id)).order_by(Pair.id)).all()
        prompt = session.get(Prompt, picture.prompt_id) if picture.prompt_id else None
        return {**picture_row(picture, prompt), "pairs": list(found)}


def totals(store: Storage, study_id: int | None) -> dict:
    """Numbers for the head of the tab: all of the lab, and the prompts of the study by split."""
    with store.reader() as session:

        def count(table, *where) -> int:
            return session.exec(select(func.count()).select_from(table).where(*where)).one()

        prompts = only(select(StudyPrompt.prompt_id), (StudyPrompt.study_id, study_id))
        return {
            "pictures": count(Picture),
            "pairs": count(Pair),
            "prompts": count(prompts.distinct().subquery()),
            "heldout": count(prompts.where(StudyPrompt.split == "heldout").distinct().subquery()),
        }


def disk_use(store: Storage) -> dict[str, int]:
    """Bytes on disk by what they are for: pictures, runs, traces, caches, database (with its backups). Of many pictures
    only some folders are added up: names are hashes, so one folder is like another."""
    data = store.data_dir
    database = sum(f.stat().st_size for f in data.glob("lab.sqlite*")) + _size(data / "backups")
    return {
        "pictures": _pictures(store.media.root),
        "runs": _size(store.runs_dir),
        "traces": _size(store.traces_dir),
        "caches": _size(store.cache_dir),
        "database": database,
    }


def _pictures(root: Path) -> int:
    folders = sorted(root.iterdir())
    total = files = looked = 0
    while looked < len(folders) and files < ENOUGH_FILES:
        total += _size(folders[looked])
        files += sum(1 for _ in folders[looked].iterdir())
        looked += 1
    return total * len(folders) // max(1, looked)


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*") if folder.exists() else ():
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # a worker tidied up meanwhile
            continue
    return total
