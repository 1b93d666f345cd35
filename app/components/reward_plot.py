"""A Plotly figure that shows, beside the curves, the picture the model predicts at the step under the pointer.

`gr.Plot` has no pointer events, so this is a `gr.HTML` component: it loads the plotly.min.js that the plotly package
ships (nothing comes from outside), redraws with `Plotly.react` whenever Python sends a new value, and fetches the
pictures of a trace by itself, once, through a server function; so moving the pointer never waits for a queue.

A value is what `app/figures.py` makes: {"figure": {"data", "layout"}, "curves": [...], "rows": [...], "note": text}.
"""

from collections.abc import Callable
from pathlib import Path

import gradio as gr
import plotly

FOLDER = Path(__file__).parent
PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"

# What never changes stands in the template: of a component that was hidden when the page came, Gradio keeps the value
# and forgets further properties.
TEMPLATE = """
<div class="rp" data-height="{height}" data-name="{name}" data-thumbnails="{thumbnails}" tabindex="0"
  aria-label="Plot; left and right arrow keys move from step to step">
  <div class="rp-main">
    <div class="rp-plot"></div>
    <div class="rp-foot"><span class="rp-note"></span><span class="rp-export">
      <button type="button" data-export="csv" title="The numbers as a table">CSV</button>
      <button type="button" data-export="svg" title="The figure, for print">SVG</button>
      <button type="button" data-export="png" title="The figure as a picture">PNG</button>
      <button type="button" data-export="html" title="The figure as a page that needs no network">HTML</button>
    </span></div>
  </div>
  <div class="rp-side" aria-live="off"></div>
  <dialog class="rp-zoom"></dialog>
</div>
"""


class RewardPlot(gr.HTML):
    """The component. `thumbnails({"trace": id, "size": pixels, "steps": [..]})` -> {step: data URI}; None: no pictures.

    `height` is the plot's height in pixels, `name` the stem of exported files.
    """

    def __init__(self, thumbnails: Callable | None = None, height: int = 420, name: str = "figure", **html_options):
        gr.set_static_paths([PLOTLY])
        super().__init__(
            html_template=TEMPLATE.format(
                height=height, name=name, thumbnails=thumbnails.__name__ if thumbnails else ""
            ),
            css_template=(FOLDER / "reward_plot.css").read_text(),
            js_on_load="".join((FOLDER / f"reward_{name}.js").read_text() for name in ("plot", "export")),
            head=f'<script src="gradio_api/file={PLOTLY.as_posix()}"></script>',
            apply_default_css=False,
            server_functions=[thumbnails] if thumbnails else None,
            **html_options,
        )
