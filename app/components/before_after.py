"""Pictures of two policies side by side: a slider that wipes from one to the other, and a grid of every prompt.

All of it runs in the browser, on pictures the browser already has: dragging, paging and choosing a row ask the
server for nothing. Only shown after a verdict: its value names the policies (see `app/comparisons.py: rows`).

A value is {"a": name, "b": name, "rows": [{"prompt", "seed", "a": picture hash, "b": picture hash, "vote": "a" | "b" |
"tie" | "both_bad" | "skip" | "", "judge_a": score or None, "judge_b": ...}]}.
"""

from pathlib import Path

import gradio as gr

FOLDER = Path(__file__).parent

TEMPLATE = """
<div class="ba" tabindex="0" aria-label="Two policies; up and down arrow keys move from prompt to prompt">
  <div class="ba-wipe">
    <div class="ba-prompt"></div>
    <div class="ba-stage"><img class="ba-b" alt=""><img class="ba-a" alt=""><div class="ba-line"></div>
      <span class="ba-tag ba-left"></span><span class="ba-tag ba-right"></span></div>
    <input class="ba-range" type="range" min="0" max="100" value="50" aria-label="How much of the left policy is shown">
    <div class="ba-facts"></div>
  </div>
  <div class="ba-list">
    <div class="ba-head"><span>Prompt</span><span class="ba-name-a"></span><span class="ba-name-b"></span></div>
    <div class="ba-rows"></div>
    <div class="ba-nav"><button type="button" class="ba-back">← back</button><span class="ba-where"></span>
      <button type="button" class="ba-on">on →</button></div>
  </div>
</div>
"""


def before_after(elem_id: str = "before-after", visible: bool = True) -> gr.HTML:
    """The component; its value is set by Python and never sent back."""
    return gr.HTML(
        value={"a": "", "b": "", "rows": []},
        html_template=TEMPLATE,
        css_template=(FOLDER / "before_after.css").read_text(),
        js_on_load=(FOLDER / "before_after.js").read_text(),
        apply_default_css=False,
        elem_id=elem_id,
        visible=visible,
    )
