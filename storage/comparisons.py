"""Blind comparisons of two policies. Every vote is a preference row; this file keeps the secret until the verdict.

Which side policy a made is drawn per pair from the system's randomness and stored in `comparison_pair` only; picture
rows are inserted in random order, files carry no metadata, and what `next_pairs` returns is what the label queue
returns. The number of votes is fixed beforehand: `complete` refuses earlier, and only the first `votes` standing
votes count. A plan with `peeking` shows totals at any time, for intervals that stay valid under peeking.
"""

import secrets
import time
from collections import Counter
from collections.abc import Collection

from PIL import Image
from sqlalchemy import text
from sqlmodel import Session, select

from .db import Storage
from .labels import shown
from .models import SIDES, Comparison, ComparisonPair, Pair, Picture
from .studies import LabelError, add_prompt, enqueue, pair_key, study_row


def create_comparison(
    store: Storage,
    study_id: int,
    policy_a: dict,
    policy_b: dict,
    *,
    prompts: list[str],
    seeds: list[int],
    votes: int,
    sampler: dict | None = None,
    peeking: bool = False,
) -> Comparison:
    """Plan a comparison: every prompt x every seed is one pair, `votes` of them decide. It waits ("preparing") until
    its pairs are added and `start_voting` is called."""
    if not prompts or not seeds or len(set(prompts)) < len(prompts) or len(set(seeds)) < len(seeds):
        raise LabelError("A comparison needs at least one prompt and one seed, each named once.")
    if not 1 <= votes <= len(prompts) * len(seeds):
        raise LabelError(
            f"{votes} votes cannot be taken from {len(prompts)} prompts x {len(seeds)} seeds; "
            f"plan 1 to {len(prompts) * len(seeds)} votes or add prompts or seeds."
        )
    plan = {"prompts": prompts, "seeds": seeds, "votes": votes, "sampler": sampler or {}, "peeking": peeking}
    row = Comparison(study_id=study_id, policy_a=policy_a, policy_b=policy_b, plan=plan)
    with store.session() as session:
        study = study_row(session, study_id)
        for prompt in prompts:
            add_prompt(session, study, prompt)
        session.add(row)
    return row


def get_comparison(store: Storage, comparison_id: int) -> Comparison:
    with store.reader() as session:
        return _comparison(session, comparison_id)


def list_comparisons(store: Storage, study_id: int | None = None) -> list[Comparison]:
    """Newest first."""
    query = select(Comparison).order_by(Comparison.id.desc())
    with store.reader() as session:
        return list(session.exec(query if study_id is None else query.where(Comparison.study_id == study_id)))


def _comparison(session: Session, comparison_id: int) -> Comparison:
    row = session.get(Comparison, comparison_id)
    if row is None:
        raise LabelError(f"There is no comparison {comparison_id} in this lab.")
    return row


_MADE = text("""SELECT prompt.text, cp.seed FROM comparison_pair cp JOIN pair ON pair.id = cp.pair_id
    JOIN prompt ON prompt.id = pair.prompt_id WHERE cp.comparison_id = :comparison""")


def missing_pairs(store: Storage, comparison_id: int) -> list[tuple[str, int]]:
    """The (prompt, seed) that still have to be sampled, in the plan's order: what a resumed job has left to do."""
    with store.reader() as session:
        plan = _comparison(session, comparison_id).plan
        made = {(row.text, row.seed) for row in session.execute(_MADE, {"comparison": comparison_id})}
    return [(p, seed) for p in plan["prompts"] for seed in plan["seeds"] if (" ".join(p.split()), seed) not in made]


def add_comparison_pair(
    store: Storage,
    comparison_id: int,
    prompt: str,
    seed: int,
    picture_a: Image.Image,
    picture_b: Image.Image,
    provenance_a: dict,
    provenance_b: dict,
) -> None:
    """Store both pictures and their pair at once, blind; adding the same (prompt, seed) again changes nothing. Returns
    nothing, so that nothing can be told."""
    order = secrets.choice((("a", "b"), ("b", "a")))  # of files and rows: neither times nor numbers tell
    pictures = {"a": picture_a, "b": picture_b}
    files = {policy: store.media.put_image(pictures[policy]) for policy in order}
    origins = {"a": provenance_a, "b": provenance_b}
    a_is = secrets.choice(SIDES)
    with store.session() as session:
        comparison = _comparison(session, comparison_id)
        if comparison.state != "preparing":
            raise LabelError(f"This comparison is {comparison.state}; pairs can be added only before the voting.")
        made = {(row.text, row.seed) for row in session.execute(_MADE, {"comparison": comparison_id})}
        if (" ".join(prompt.split()), seed) in made:
            return
        asked = add_prompt(session, study_row(session, comparison.study_id), prompt)
        ids = {}
        for policy in order:
            digest, width, height = files[policy]
            row = Picture(hash=digest, width=width, height=height, prompt_id=asked.id, provenance=origins[policy])
            session.add(row)
            session.flush()
            ids[policy] = row.id
        first, second = ("a", "b") if a_is == "first" else ("b", "a")
        key = pair_key(asked.id, files["a"][0], files["b"][0])
        pair = Pair(prompt_id=asked.id, first_id=ids[first], second_id=ids[second], origin="comparison", key=key)
        session.add(pair)
        session.flush()
        place = secrets.randbits(31)  # the voting order mixes prompts and says nothing of the sampling order
        session.add(ComparisonPair(comparison_id=comparison_id, pair_id=pair.id, a_is=a_is, seed=seed, position=place))


def start_voting(store: Storage, comparison_id: int) -> Comparison:
    """All pairs are there: open the comparison for votes. Raises LabelError while some are missing."""
    missing = len(missing_pairs(store, comparison_id))
    if missing:
        raise LabelError(f"{missing} pairs of this comparison have no pictures yet; let the job finish first.")
    with store.session() as session:
        row = _comparison(session, comparison_id)
        if row.state == "preparing":
            row.state = "voting"
    return row


# pairs this annotator has not answered, those with the fewest votes of others first
_ASK = text("""SELECT cp.pair_id, (SELECT COUNT(*) FROM preference o
        WHERE o.study_id = :study AND o.pair_id = cp.pair_id AND o.choice != 'skip'
        AND NOT EXISTS (SELECT 1 FROM preference r WHERE r.revokes = o.id)) AS votes
    FROM comparison_pair cp WHERE cp.comparison_id = :comparison AND NOT EXISTS (SELECT 1 FROM preference p
        WHERE p.study_id = :study AND p.annotator_id = :annotator AND p.pair_id = cp.pair_id AND p.choice IS NOT NULL
        AND NOT EXISTS (SELECT 1 FROM preference r WHERE r.revokes = p.id))
    ORDER BY votes, cp.position LIMIT :limit""")

_VOTES = text("""SELECT p.id, p.pair_id, p.annotator_id, p.choice, p."left", p.simulated, p.milliseconds, cp.a_is,
        cp.seed, prompt.id AS prompt_id, prompt.text AS prompt
    FROM preference p JOIN comparison_pair cp ON cp.pair_id = p.pair_id AND cp.comparison_id = :comparison
    JOIN pair ON pair.id = p.pair_id JOIN prompt ON prompt.id = pair.prompt_id
    WHERE p.comparison_id = :comparison AND p.choice IS NOT NULL
    AND NOT EXISTS (SELECT 1 FROM preference r WHERE r.revokes = p.id) ORDER BY p.id""")


def next_comparison_pairs(
    store: Storage, comparison_id: int, annotator_id: int, n: int = 1, exclude: Collection[int] = ()
) -> list[dict]:
    """As labels.next_pairs, for the pairs of one comparison; empty once the planned votes are in. Vote with
    labels.vote, take back with labels.undo(..., comparison_id=...)."""
    excluded = set(exclude)
    with store.reader() as session:
        row = _comparison(session, comparison_id)
        if row.state != "voting" or len(counted(session, row)) >= row.plan["votes"]:
            return []
        study = study_row(session, row.study_id)
        who = {"comparison": comparison_id, "study": row.study_id, "annotator": annotator_id}
        found = session.execute(_ASK, {**who, "limit": n + len(excluded)}).all()
        ids = [each.pair_id for each in found if each.pair_id not in excluded][:n]
        return [shown(session, study, annotator_id, pair_id) for pair_id in ids]


def comparison_progress(store: Storage, comparison_id: int) -> dict:
    """{state, votes, planned, pairs, skipped, left}: `votes` counts standing answers other than skip, up to the plan;
    `left` the pairs that nobody has answered yet."""
    with store.reader() as session:
        row = _comparison(session, comparison_id)
        votes = session.execute(_VOTES, {"comparison": comparison_id}).mappings().all()
        made = len(session.execute(_MADE, {"comparison": comparison_id}).all())
    skipped = sum(vote["choice"] == "skip" for vote in votes)
    planned = row.plan["votes"]
    return {
        "state": row.state, "votes": min(len(votes) - skipped, planned), "planned": planned, "pairs": made,
        "skipped": skipped, "left": made - len({vote["pair_id"] for vote in votes}),
    }  # fmt: skip


def standing_votes(session: Session, comparison_id: int) -> list[dict]:
    """Every vote that was not taken back, in order, with whose picture was which: what `result_of` takes."""
    return [dict(vote) for vote in session.execute(_VOTES, {"comparison": comparison_id}).mappings()]


def counted(session: Session, row: Comparison) -> list[dict]:
    """The votes that decide: the first `votes` of the plan among standing answers other than skip."""
    standing = standing_votes(session, row.id)
    last = {(vote["pair_id"], vote["annotator_id"]): vote for vote in standing if vote["choice"] != "skip"}
    return sorted(last.values(), key=lambda vote: vote["id"])[: row.plan["votes"]]


def complete(store: Storage, comparison_id: int) -> Comparison:
    """End the voting and bring out the verdict; from now on votes cannot be taken back, and the pairs join the label
    queue. Raises LabelError before the planned number of votes, unless the plan allows peeking or every pair has been
    answered: skipped pairs must not keep a verdict back for ever."""
    with store.session() as session:
        row = _comparison(session, comparison_id)
        if row.state == "complete":
            return row
        if row.state != "voting":
            raise LabelError(f"This comparison is {row.state}; only a running one can be completed.")
        votes = counted(session, row)
        if len(votes) < row.plan["votes"] and not row.plan.get("peeking") and _unanswered(session, row):
            raise LabelError(
                f"{len(votes)} of {row.plan['votes']} planned votes are in; the verdict waits for all of them."
            )
        row.result = result_of(votes)
        _close(session, row, "complete")
    return row


def _unanswered(session: Session, row: Comparison) -> int:
    """How many pairs nobody has answered, not even with a skip."""
    answered = {vote["pair_id"] for vote in session.execute(_VOTES, {"comparison": row.id}).mappings()}
    return len(session.execute(_MADE, {"comparison": row.id}).all()) - len(answered)


def abandon(store: Storage, comparison_id: int) -> Comparison:
    """Give up a comparison without a verdict; its votes stay labels, its pairs join the label queue."""
    with store.session() as session:
        row = _comparison(session, comparison_id)
        if row.state in ("preparing", "voting"):
            _close(session, row, "abandoned")
    return row


def _close(session: Session, row: Comparison, state: str) -> None:
    row.state = state
    row.completed_at = time.time()
    session.add(row)
    study = study_row(session, row.study_id)
    query = select(Pair).join(ComparisonPair).where(ComparisonPair.comparison_id == row.id)
    pairs = list(session.exec(query.order_by(ComparisonPair.position)))
    hashes = {p.id: p.hash for p in session.exec(select(Picture).where(Picture.id.in_(_sides(pairs))))}
    for pair in pairs:
        if hashes[pair.first_id] != hashes[pair.second_id]:  # both policies drew the very same: nothing to ask
            enqueue(session, study, pair)


def _sides(pairs: list[Pair]) -> list[int]:
    return [side for pair in pairs for side in (pair.first_id, pair.second_id)]


def outcome(choice: str, a_is: str) -> str:
    """ "a", "b", "tie" or "both_bad": who won."""
    if choice not in SIDES:
        return choice
    return "a" if choice == a_is else "b"


def result_of(votes: list[dict]) -> dict:
    """What the votes come to, as `comparison_results` gives it."""
    rows = [
        {
            "prompt_id": vote["prompt_id"], "prompt": vote["prompt"], "seed": vote["seed"], "pair_id": vote["pair_id"],
            "annotator_id": vote["annotator_id"], "simulated": bool(vote["simulated"]),
            "outcome": outcome(vote["choice"], vote["a_is"]),
        }
        for vote in votes
    ]  # fmt: skip
    won = Counter(row["outcome"] for row in rows)
    ties = won["tie"] + won["both_bad"]
    return {"wins": won["a"], "ties": ties, "losses": won["b"], "both_bad": won["both_bad"], "votes": rows}


def comparison_results(store: Storage, comparison_id: int) -> dict:
    """{wins, ties, losses (of policy a; both-bad counts as a tie), both_bad, votes: [{prompt_id, prompt, seed, pair_id,
    annotator_id, simulated, outcome}]}. Before the verdict this is refused, unless the plan allows peeking; pair ids
    are then left out."""
    with store.reader() as session:
        row = _comparison(session, comparison_id)
        if row.state == "complete":
            return row.result
        if row.state != "abandoned" and not row.plan.get("peeking"):
            raise LabelError("The verdict of this comparison is not out yet; finish the planned votes first.")
        result = result_of(counted(session, row))
    if row.state != "abandoned":
        for vote in result["votes"]:
            del vote["pair_id"], vote["seed"]
    return result


def comparison_pairs(store: Storage, comparison_id: int) -> list[dict]:
    """Who made what, after the verdict: [{pair_id, prompt_id, prompt, seed, a, b}] with picture hashes."""
    query = text("""SELECT cp.pair_id, prompt.id AS prompt_id, prompt.text AS prompt, cp.seed,
        CASE cp.a_is WHEN 'first' THEN f.hash ELSE s.hash END AS a,
        CASE cp.a_is WHEN 'first' THEN s.hash ELSE f.hash END AS b
        FROM comparison_pair cp JOIN pair ON pair.id = cp.pair_id JOIN prompt ON prompt.id = pair.prompt_id
        JOIN picture f ON f.id = pair.first_id JOIN picture s ON s.id = pair.second_id
        WHERE cp.comparison_id = :comparison ORDER BY prompt.id, cp.seed""")
    with store.reader() as session:
        if _comparison(session, comparison_id).state in ("preparing", "voting"):
            raise LabelError("Who made which picture is told after the verdict; finish the planned votes first.")
        return [dict(row) for row in session.execute(query, {"comparison": comparison_id}).mappings()]
