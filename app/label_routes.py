"""The routes behind the pair picker: who is voting, the next pairs, a vote, an undo.

Routes of our own instead of Gradio events: an answer takes milliseconds, a cookie can be read, a retried request can
be recognised, and the page may be gone when the answer arrives. Every POST checks cookie and Origin itself. Nothing in
an answer tells which policy made a picture: pairs of a comparison look exactly like pairs of the label queue.
"""

import hashlib
from collections.abc import Callable
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field
from sqlalchemy import text

from app.lab import Lab
from app.security import annotator_name, same_origin, set_annotator
from storage import StorageError, Unwritable, comparisons, labels
from storage import jobs as queue
from storage.models import Annotator, Study

DEFAULT_NAME = "me"
MOST_PAIRS = 32
MOST_EXCLUDED = 400
ACTIVE = ("queued", "running", "stopping")
OTHERS = (
    "Another page has chosen another study, and pairs are drawn for that one. Choose this one again below, under "
    "“Studies”."
)
FAILED = "The last try to make pairs failed: {} Mend that and try again below, or choose another study."
NOTHING = "Nothing makes pairs for this study. Make some below, under “Pairs for your own prompts”."
NOBODY = "Pairs are drawn once the lab runs with its workers: it was started with --no-workers."

Id = Annotated[int, Field(ge=1, le=2**53)]
Key = Annotated[str, Field(min_length=8, max_length=64)]


class Refusal(Exception):
    """An answer other than 200: `status` and one sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class Plain(APIRoute):
    """A route whose every failure is {"error": one sentence}."""

    def get_route_handler(self) -> Callable:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                where = error.errors()[0]
                # of JSON that is none, the place is a number: at which character
                field = " ".join(part for part in where["loc"][1:] if isinstance(part, str))
                what = f"The {field} of this request" if field else "This request"
                sentence = f"{what} is wrong ({where['msg'].lower()}); reload the page."
                return JSONResponse({"error": sentence}, 400)
            except Refusal as refusal:
                return JSONResponse({"error": str(refusal)}, refusal.status)
            except Unwritable as error:
                return JSONResponse({"error": str(error)}, 503)  # not the vote's fault: the page sends it again
            except StorageError as error:
                return JSONResponse({"error": str(error)}, 400)

        return answer


class Name(BaseModel):
    name: str = Field(max_length=200)


class Undo(BaseModel):
    """`study_key` and `annotator` are what the page had been told when the key was pressed."""

    study: Id
    study_key: str = Field(max_length=64)
    annotator: str = Field(max_length=200)
    comparison: Id | None = None
    client_key: Key


class Vote(Undo):
    pair: Id
    choice: Literal["left", "right", "tie", "both_bad", "skip"]
    left: Literal["first", "second"]
    milliseconds: int = Field(ge=0, le=2**31)


def router(lab: Lab) -> APIRouter:
    """GET and POST /api/annotator, GET /api/pairs/next, POST /api/pairs/vote, POST /api/pairs/undo."""
    routes = APIRouter(prefix="/api", route_class=Plain)

    @routes.get("/annotator")
    def who(request: Request, response: Response) -> dict:
        response.headers["Cache-Control"] = "no-store"
        humans = [row.name for row in labels.list_annotators(lab.store) if row.kind == "human"]
        name = annotator_name(lab, request)
        return {"name": name if name in humans else None, "suggested": DEFAULT_NAME, "known": humans}

    @routes.post("/annotator")
    def choose_name(body: Name, request: Request, response: Response) -> dict:
        check_origin(request)
        row = labels.annotator(lab.store, body.name)
        set_annotator(lab, request, response, row.name)
        return {"name": row.name}

    @routes.get("/pairs/next")
    def next_pairs(
        request: Request, response: Response, study: Id, comparison: Id | None = None,
        n: Annotated[int, Field(ge=1, le=MOST_PAIRS)] = 12,
        exclude: Annotated[str, Field(pattern=r"^(\d{1,15}(,\d{1,15})*)?$", max_length=16 * MOST_EXCLUDED)] = "",
    ) -> dict:  # fmt: skip
        response.headers["Cache-Control"] = "no-store"
        person = annotator(lab, request)
        row = labels.get_study(lab.store, study)
        seen = [int(part) for part in exclude.split(",") if part]
        if comparison is None:
            found = labels.next_pairs(lab.store, study, person.id, n, seen)
        else:
            check_comparison(lab, study, comparison)
            found = comparisons.next_comparison_pairs(lab.store, comparison, person.id, n, seen)
        return {
            "study_key": study_key(row),
            "question": row.question,
            "pairs": [on_page(item) for item in found],
            **state(lab, row, person, comparison, bool(found)),
        }

    @routes.post("/pairs/vote")
    def vote(body: Vote, request: Request) -> dict:
        person, row = check(lab, request, body)
        choice = body.choice
        if choice in ("left", "right"):
            choice = body.left if choice == "left" else {"first": "second", "second": "first"}[body.left]
        if body.comparison is not None:
            check_comparison(lab, row.id, body.comparison)
        labels.vote(
            lab.store,
            study_id=row.id,
            pair_id=body.pair,
            annotator_id=person.id,
            choice=choice,
            left=body.left,
            milliseconds=body.milliseconds,
            client_key=body.client_key,
        )
        return {"saved": body.client_key, **stats(lab, row, person, body.comparison)}

    @routes.post("/pairs/undo")
    def undo(body: Undo, request: Request) -> dict:
        person, row = check(lab, request, body)
        if body.comparison is not None:
            check_comparison(lab, row.id, body.comparison)
        item = labels.undo(lab.store, row.id, person.id, body.client_key, body.comparison)
        restored = None if item is None else on_page(item)
        return {"saved": body.client_key, "pair": restored, **stats(lab, row, person, body.comparison)}

    return routes


# --- who may do what ----------------------------------------------------------------------------------------------


def check_origin(request: Request) -> None:
    """Refuses a POST that does not come from our own page; browsers send Origin with every one of theirs."""
    if request.headers.get("origin") is None or not same_origin(dict(request.headers)):
        raise Refusal(403, "This request did not come from the lab's own page; open the lab and vote there.")


def annotator(lab: Lab, request: Request) -> Annotator:
    """The human that the signed cookie names."""
    name = annotator_name(lab, request)
    row = next((each for each in labels.list_annotators(lab.store) if each.name == name), None) if name else None
    if row is None or row.kind != "human":
        raise Refusal(401, "Nobody's name is known here; choose a name first.")
    return row


def check(lab: Lab, request: Request, body: Undo) -> tuple[Annotator, Study]:
    """Cookie and Origin; and that the vote was given by this person, in this lab: it may have waited for days."""
    check_origin(request)
    person = annotator(lab, request)
    if person.name != body.annotator:
        raise Refusal(409, f"This vote is {body.annotator}'s, but {person.name} is voting here now.")
    row = labels.get_study(lab.store, body.study)
    if study_key(row) != body.study_key:
        raise Refusal(410, "This vote was given in another lab that was served at this address; open that lab again.")
    return person, row


def check_comparison(lab: Lab, study: int, comparison: int) -> None:
    if comparisons.get_comparison(lab.store, comparison).study_id != study:
        raise Refusal(400, f"Comparison {comparison} belongs to another study; reload the page.")


def study_key(study: Study) -> str:
    """Tells studies of the same number in different data folders apart; says nothing else."""
    return hashlib.sha256(f"{study.id}\n{study.created_at!r}".encode()).hexdigest()[:16]


# --- what the page is told ----------------------------------------------------------------------------------------


def on_page(item: dict) -> dict:
    """A pair as the page may see it: which picture goes where, and nothing about who made it."""
    right = "second" if item["left"] == "first" else "first"
    sides = {
        side: {"url": f"media/{item[name]}", "width": item[f"{name}_width"], "height": item[f"{name}_height"]}
        for side, name in (("left_picture", item["left"]), ("right_picture", right))
    }
    return {"pair": item["pair_id"], "prompt": item["prompt"], "left": item["left"], **sides}


_TOTAL = text("""SELECT COUNT(*) FROM preference p WHERE p.study_id = :study AND p.choice IS NOT NULL
    AND NOT EXISTS (SELECT 1 FROM preference r WHERE r.revokes = p.id)""")


def stats(lab: Lab, study: Study, person: Annotator, comparison: int | None) -> dict:
    """{"stats": ...}: own labels (today, in the study), everybody's, pace, pairs left; or a comparison's votes."""
    if comparison is not None:
        progress = comparisons.comparison_progress(lab.store, comparison)
        return {"stats": {"votes": progress["votes"], "planned": progress["planned"]}}
    with lab.store.reader() as session:
        total = session.execute(_TOTAL, {"study": study.id}).scalar()
    return {"stats": {**labels.progress(lab.store, study.id, person.id), "total": total}}


def state(lab: Lab, study: Study, person: Annotator, comparison: int | None, found: bool) -> dict:
    """`stats`, `state` and a `message`; what the page shows while it has no pair.

    `state` is "ready" (there are pairs), "filling" (they are being made), "stuck" (nobody makes any) or "done".
    """
    told = {**stats(lab, study, person, comparison), "progress": None}
    if comparison is not None:
        where = comparisons.comparison_progress(lab.store, comparison)["state"]
        return {**told, "state": "filling" if where == "preparing" else "ready" if found else "done", "message": ""}
    making = queue.list_jobs(lab.store, kinds=("pairs",), states=ACTIVE, study_id=study.id, limit=1)
    if making:
        job = making[0]
        turn = "The next pairs wait for their turn." if lab.settings.workers else NOBODY
        words = job.message or (turn if job.state == "queued" else "Pictures are being drawn.")
        return {**told, "state": "ready" if found else "filling", "message": words, "progress": job.progress}
    if found or told["stats"]["left"]:
        return {**told, "state": "ready", "message": ""}
    name, words = _without_pairs(lab, study, labelled=bool(told["stats"]["labels"]))
    return {**told, "state": name, "message": words}


def _without_pairs(lab: Lab, study: Study, labelled: bool) -> tuple[str, str]:
    """`state` and `message` of a study that has no pair, and for which none is being made."""
    latest = queue.list_jobs(lab.store, kinds=("pairs",), study_id=study.id, limit=1)
    if latest and latest[0].state == "failed":
        return "stuck", FAILED.format(latest[0].error)
    current = lab.current_study().id == study.id
    if lab.settings.workers and current and study.settings.get("refill", True):
        return "filling", "Pairs are about to be drawn."
    if labelled:
        return "done", ""
    if not lab.settings.workers:
        return "stuck", NOBODY
    return "stuck", NOTHING if current else OTHERS
