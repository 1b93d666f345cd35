"""Download links of exported models. A route of our own, so that a file of any size is streamed from the run folder."""

from fastapi import APIRouter
from fastapi.responses import FileResponse, JSONResponse

from app.data_routes import JOB_ID
from app.lab import Lab
from app.models import EXPORT
from storage import StorageError
from storage import jobs as queue


def router(lab: Lab) -> APIRouter:
    """GET /models/{job id}/{index}: one of the files of a finished export."""
    routes = APIRouter()

    @routes.get("/models/{job_id}/{index}")
    def download(job_id: str, index: str):
        gone = JSONResponse({"error": "There is no such file; export the model again in the Train tab."}, 404)
        try:
            job = queue.get(lab.store, job_id) if JOB_ID.fullmatch(job_id) else None
        except StorageError:
            return gone
        if job is None or job.kind != EXPORT or job.state != "done":
            return gone
        names = [file["name"] for file in job.result["files"]]
        if not index.isascii() or not index.isdigit() or int(index) >= len(names):
            return gone
        path = lab.store.runs_dir / job.id / "export" / names[int(index)]
        headers = {"Cache-Control": "private, no-store"}
        return FileResponse(path, filename=path.name, headers=headers) if path.is_file() else gone

    return routes
