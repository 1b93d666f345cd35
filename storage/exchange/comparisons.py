"""Comparisons on their way out and in: comparisons.jsonl beside pairs.jsonl, one finished comparison a line.

    {key, policy_a, policy_b, plan, state, seed, created_at, completed_at, wins, ties, losses,
     counted: [client keys of the votes that decided, in order]}

Its pairs are lines of pairs.jsonl that name its key, its votes are their labels. Comparisons that still run stay
behind: their secret would travel with them. On the way in a verdict is counted again from the votes; until all pairs
are in, and for ever if the file's verdict does not follow from its votes, the comparison is an abandoned one.
"""

from sqlmodel import Session, select

from ..comparisons import counted, result_of, standing_votes
from ..db import Storage
from ..models import Comparison, ComparisonPair, Pair, Picture, Preference, Study
from ..studies import enqueue, pair_key
from .items import Place, Rejected
from .tally import Tally

STATES = ("complete", "abandoned")
MAX_VOTES = 1_000_000


def key_of(seed: int | None) -> str | None:
    """Names a comparison in every lab: its random seed, as text (62 bits do not fit every JSON reader)."""
    return None if seed is None else f"{seed:016x}"


def finished(session: Session, study_id: int) -> list[dict]:
    """The study's complete and abandoned comparisons, oldest first, as the lines above."""
    query = select(Comparison).where(Comparison.study_id == study_id, Comparison.state.in_(STATES))
    return [_line(session, row) for row in session.exec(query.order_by(Comparison.id))]


def _line(session: Session, row: Comparison) -> dict:
    told = {"policy_a", "policy_b", "plan", "state", "created_at", "completed_at"}
    votes = select(Preference.id, Preference.client_key).where(Preference.comparison_id == row.id)
    keys = dict(session.exec(votes).all())
    return {
        "key": key_of(row.seed), **row.model_dump(include=told),
        **{name: (row.result or {}).get(name) for name in ("wins", "ties", "losses")},
        "counted": [keys[vote["id"]] for vote in counted(session, row)],
    }  # fmt: skip


def begin(store: Storage, tally: Tally, told: list[dict | Rejected]) -> None:
    """Make the comparisons that the study does not have, as abandoned ones, and remember all by their key."""
    for line in told:
        try:
            seed = _check(line)
        except Rejected as reason:
            if not tally.resumed:  # else it is in the report already
                tally.reject(str(reason), 0)
            continue
        with store.session() as session:
            query = select(Comparison).where(Comparison.study_id == tally.study_id, Comparison.seed == seed)
            row = session.exec(query).first()
            if row is None:
                kept = {name: line[name] for name in ("policy_a", "policy_b", "plan", "created_at", "completed_at")}
                row = Comparison(study_id=tally.study_id, seed=seed, state="abandoned", **kept)
                session.add(row)
                session.flush()
            tally.comparisons[line["key"]] = row.id


def _check(line: dict | Rejected) -> int:
    """The comparison's seed; raises Rejected for anything that the page could not show."""
    if isinstance(line, Rejected):
        raise line
    plan = line.get("plan")
    whole = isinstance(plan, dict) and all(isinstance(line.get(name), dict) for name in ("policy_a", "policy_b"))
    whole = whole and all(isinstance(plan.get(name), list) for name in ("prompts", "seeds"))
    whole = whole and isinstance(plan.get("votes"), int) and 1 <= plan["votes"] <= MAX_VOTES
    times = (line.get("created_at"), line.get("completed_at"))
    whole = whole and all(isinstance(each, int | float) and 0 <= each < 2**40 for each in times)
    keys = line.get("counted")
    whole = whole and isinstance(keys, list) and len(keys) <= MAX_VOTES and all(isinstance(each, str) for each in keys)
    try:
        seed = int(line["key"], 16)
    except (KeyError, TypeError, ValueError):
        seed = -1
    if not whole or line.get("state") not in STATES or not 0 <= seed < 2**62:
        raise Rejected("comparison: its plan, policies, times, votes or state are wrong")
    return seed


def put_pair(
    session: Session, study: Study, comparison_id: int, place: Place, prompt_id: int, picture_ids: list[int]
) -> Pair:
    """The pair of a comparison that came with the file; the same again is the same pair."""
    hashes = [session.get(Picture, each).hash for each in picture_ids]
    key = pair_key(prompt_id, *hashes)
    query = select(Pair).join(ComparisonPair).where(ComparisonPair.comparison_id == comparison_id, Pair.key == key)
    row = session.exec(query).first()
    if row is None:
        row = Pair(prompt_id=prompt_id, first_id=picture_ids[0], second_id=picture_ids[1], origin="comparison", key=key)
        session.add(row)
        session.flush()
        session.add(
            ComparisonPair(
                comparison_id=comparison_id, pair_id=row.id, a_is=place.a_is, seed=place.seed, position=place.position
            )
        )
        enqueue(session, study, row)
    return row


def finish(store: Storage, tally: Tally, told: list[dict | Rejected]) -> None:
    """Count the verdicts of complete comparisons from their votes; one that differs from the file's is rejected."""
    for line in told:
        if isinstance(line, Rejected) or line.get("key") not in tally.comparisons or line["state"] != "complete":
            continue
        with store.session() as session:
            row = session.get(Comparison, tally.comparisons[line["key"]])
            if row.state != "abandoned":
                continue  # it was here already, with its verdict
            result = result_of(_votes(session, row, line["counted"]))
            if any(result[name] != line.get(name) for name in ("wins", "ties", "losses")):
                tally.reject("comparison: its votes do not give the verdict that the file names", 0)
                continue
            row.state, row.result = "complete", result


def _votes(session: Session, row: Comparison, keys: list[str]) -> list[dict]:
    """The votes of these client keys, in their order; a key may carry the study's number here (see put.py)."""
    standing = {vote["id"]: vote for vote in standing_votes(session, row.id)}
    found = session.exec(select(Preference.client_key, Preference.id).where(Preference.comparison_id == row.id)).all()
    ids = dict(found)
    places = [ids.get(key, ids.get(f"{row.study_id}:{key}")) for key in keys]
    return [standing[place] for place in places if place in standing]
