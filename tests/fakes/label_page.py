"""The pair picker on a bare page, without Gradio: what the browser tests need of the lab, started in a second.

python tests/fakes/label_page.py --data-dir DIR --port PORT        then open /?study=1 or /?study=1&comparison=1
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import uvicorn  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse  # noqa: E402

import storage  # noqa: E402
from app import label_routes  # noqa: E402
from app.components.pair_files import script  # noqa: E402
from app.lab import Lab, Settings  # noqa: E402
from storage.media import MEDIA_TYPES  # noqa: E402

COMPONENTS = ROOT / "app" / "components"
PAGE = """<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Preference Lab</title><style>
:root { --body-text-color: #1e293b; --background-fill-primary: #fff; --background-fill-secondary: #f8fafc;
  --border-color-primary: #e2e8f0; --color-accent: #6366f1; }
body { margin: 0; padding: 46px 20px 16px; font: 14px system-ui, sans-serif; } #label-picker { @CSS@ }
</style><div id="label-picker">@HTML@</div><textarea></textarea><button role="tab" id="hide">Data</button><script>
const query = new URLSearchParams(location.search);
const element = document.querySelector('#label-picker');
const number = (name) => (query.get(name) ? Number(query.get(name)) : null);
const props = { value: { study: number('study'), comparison: number('comparison') } };
window.triggered = [];
document.querySelector('#hide').onclick = () => { element.hidden = !element.hidden; };
Function('element', 'trigger', 'props', 'server', 'upload', 'watch', @JS@)(
  element, (name, data) => window.triggered.push([name, data]), props, {}, null, () => {});
</script>"""


def page() -> str:
    """The component's files in a page; the script as a string, because Gradio makes a function of it, too."""
    import json

    parts = {
        "@CSS@": (COMPONENTS / "pair_picker.css").read_text(),
        "@HTML@": (COMPONENTS / "pair_picker.html").read_text(),
        "@JS@": json.dumps(script()).replace("</", "<\\/"),
    }
    text = PAGE
    for mark, part in parts.items():
        text = text.replace(mark, part)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    store = storage.open(arguments.data_dir)
    lab = Lab(store, Settings(data_dir=arguments.data_dir, workers=False))
    app = FastAPI()
    app.include_router(label_routes.router(lab))
    app.get("/healthz")(lambda: PlainTextResponse("ok"))
    app.get("/")(lambda: HTMLResponse(page()))

    @app.get("/media/{name}")
    def media(name: str):
        path = store.media.path(name)
        return FileResponse(path, media_type=MEDIA_TYPES[path.suffix], headers={"Cache-Control": "max-age=31536000"})

    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
