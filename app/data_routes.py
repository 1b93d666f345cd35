"""The download link of an export. A route of our own, so that a file of any size is streamed from the run folder."""

import re

from fastapi import APIRouter
from fastapi.responses import FileResponse, JSONResponse

from app.lab import Lab
from storage import StorageError
from storage import jobs as queue
from storage.studies import get_study

JOB_ID = re.compile(r"[0-9a-f]{32}")


def router(lab: Lab) -> APIRouter:
    """GET /exports/{job id}: the file of a finished export, under a name that says what it is."""
    routes = APIRouter()

    @routes.get("/exports/{job_id}")
    def download(job_id: str):
        try:
            job = queue.get(lab.store, job_id) if JOB_ID.fullmatch(job_id) else None
        except StorageError:
            job = None
        if job is None or job.kind != "export" or job.state != "done":
            return JSONResponse({"error": "There is no such export; export again in the Data tab."}, status_code=404)
        path = lab.store.runs_dir / job.id / job.result["path"]
        if not path.exists():
            return JSONResponse({"error": "This export was deleted; export again in the Data tab."}, status_code=404)
        study = re.sub(r"[^A-Za-z0-9]+", "-", get_study(lab.store, job.config["study_id"]).name).strip("-") or "study"
        return FileResponse(path, filename=f"{study}{path.suffix}", headers={"Cache-Control": "private, no-store"})

    return routes
