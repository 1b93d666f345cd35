"""What the Data tab's links download: an export, and the rejected rows of an import. Routes of our own, so that a file
of any size is streamed."""

import csv
import io
import re
from collections.abc import Iterator
from itertools import chain

from fastapi import APIRouter
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from app.lab import Lab
from storage import StorageError, exchange
from storage import jobs as queue
from storage.models import Job
from storage.studies import get_study

PRIVATE = {"Cache-Control": "private, no-store"}
JOB_ID = re.compile(r"[0-9a-f]{32}")


def router(lab: Lab) -> APIRouter:
    """GET /exports/{job id}: the file of a finished export, under a name that says what it is.
    GET /imports/{job id}/rejected.csv: row number and reason of every rejected row."""
    routes = APIRouter()

    @routes.get("/exports/{job_id}")
    def download(job_id: str):
        job = _finished(lab, job_id, "export")
        if job is None:
            return JSONResponse({"error": "There is no such export; export again in the Data tab."}, status_code=404)
        path = lab.store.runs_dir / job.id / job.result["path"]
        if not path.exists():
            return JSONResponse({"error": "This export was deleted; export again in the Data tab."}, status_code=404)
        study = re.sub(r"[^A-Za-z0-9]+", "-", get_study(lab.store, job.config["study_id"]).name).strip("-") or "study"
        return FileResponse(path, filename=f"{study}{path.suffix}", headers=PRIVATE)

    @routes.get("/imports/{job_id}/rejected.csv")
    def rejected(job_id: str):
        job = _finished(lab, job_id, "import")
        if job is None or "import_id" not in job.result:
            return JSONResponse({"error": "There is no such finished import; see the Data tab."}, status_code=404)
        rows = exchange.rejected_rows(lab.store, job.result["import_id"])
        name = re.sub(r"[^A-Za-z0-9]+", "-", job.config["name"]).strip("-") or "import"
        headers = {"Content-Disposition": f"attachment; filename={name}-rejected.csv", **PRIVATE}
        return StreamingResponse(_csv(rows), media_type="text/csv", headers=headers)

    return routes


def _finished(lab: Lab, job_id: str, kind: str) -> Job | None:
    try:
        job = queue.get(lab.store, job_id) if JOB_ID.fullmatch(job_id) else None
    except StorageError:
        return None
    return job if job is not None and job.kind == kind and job.state == "done" else None


def _csv(rows: Iterator[tuple[int, str]]) -> Iterator[str]:
    """Lines of a CSV file with the columns row and reason."""
    line = io.StringIO()
    writer = csv.writer(line)
    for row in chain([("row", "reason")], rows):
        writer.writerow(row)
        yield line.getvalue()
        line.seek(0)
        line.truncate()
