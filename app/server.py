"""The web server: our own routes, the guard in front of everything, and the Gradio page mounted at "/"."""

import importlib.util
from pathlib import Path

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse

from app import data_routes, label_routes, model_routes, ui
from app.lab import Lab
from app.security import Guard
from storage import StorageError
from storage.media import MEDIA_TYPES

COMPONENTS = Path(__file__).parent / "components"


def create_app(lab: Lab) -> FastAPI:
    """The whole application for `lab`: routes of our own first, then the page."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, signer=lab.signer, password=lab.settings.password)

    @app.get("/healthz")
    def healthz() -> dict:
        return {"ok": True}

    @app.get("/media/{name}")
    def media(name: str):
        try:
            path = lab.store.media.path(name)
        except StorageError as error:
            return JSONResponse({"error": str(error)}, status_code=404)
        headers = {"Cache-Control": "private, max-age=31536000, immutable"}
        return FileResponse(path, media_type=MEDIA_TYPES[path.suffix], headers=headers)

    app.include_router(label_routes.router(lab))
    app.include_router(data_routes.router(lab))
    app.include_router(model_routes.router(lab))

    # plotly.min.js lies in the plotly package; find_spec does not import it
    plotly = Path(importlib.util.find_spec("plotly").origin).parent / "package_data"
    gr.set_static_paths([COMPONENTS, plotly])
    return gr.mount_gradio_app(
        app,
        ui.build_ui(lab).queue(api_open=False, default_concurrency_limit=8),
        path="/",
        server_name=lab.settings.host,
        server_port=lab.settings.port,
        theme=ui.THEME,
        css=ui.CSS,
        js=ui.JS,
        head=ui.HEAD,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        show_error=True,
        max_file_size="4gb",
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
    )
