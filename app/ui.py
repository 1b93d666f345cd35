"""Assembles the five tabs; no logic. Also the one place that says how the page looks."""

from pathlib import Path

import gradio as gr
import segno

from app.lab import Lab
from app.security import is_loopback
from app.tabs import compare, curves, data, label, train

TABS = (("Label", label), ("Curves", curves), ("Train", train), ("Compare", compare), ("Data", data))

# Only fonts that the system has: a page of the lab loads nothing from outside.
THEME = gr.themes.Default(
    primary_hue="indigo",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(checkbox_border_color_dark="*neutral_400")  # Gradio's is the colour of what is around it
CSS = """
.gradio-container {
  width: 100% !important; max-width: 1440px !important; margin: 0 auto !important; padding: 0 !important;
}
.gradio-container > .main { padding: 4px 20px 16px !important; max-width: none !important; }
footer { display: none !important; }
.form-row .block { justify-content: flex-end; }
.form-row > .form > .block { min-width: min(150px, 100%) !important; }  /* Gradio forgets it for checkboxes */
.dense, .dense > .column, .dense > .form { gap: 8px !important; }
.dense .tabitem { padding: 0 !important; }
.dense .tab-wrapper { margin-bottom: 8px !important; }
.dense .html-container { padding: 0 !important; }
.beside-button, .row > button { align-self: center; }
#train-log textarea { font: 12px/1.45 var(--font-mono); }
/* the figures' blue is meant for paper: as a name on dark it needs more light */
.dark .rp-card b, .dark .rp .annotation-text { filter: brightness(1.5); }
/* Gradio lets a long choice run under the caret of its dropdown */
.wrap-inner:not(:has(.token)) input[role=combobox] { padding-inline-end: 16px; text-overflow: ellipsis; }
.wrap-inner:not(:has(.token)) { padding-inline: 8px 0 !important; }
.wrap-inner:not(:has(.token)) .icon-wrap { inset-inline-end: 8px !important; }
.gradio-container :is(button, a):focus-visible { outline: 2px solid var(--color-accent); outline-offset: 2px; }
.gradio-container :is([role=tab], .tq-row):focus-visible { outline-offset: -2px; }
/* On a phone all five tabs fit, and both forms of Train: nobody looks for them behind "…". */
@media (max-width: 480px) {
  .tab-container button { padding-inline: 7px !important; }
  .row > .beside-button { flex: 1 1 100%; }
  .row > .column { flex-grow: 1 !important; }  /* one column: what is narrow beside another has the width to itself */
}
"""
# A double click starts one thing: buttons of the class events.ONCE do not hear its second half.
JS = """() => document.addEventListener('click', (event) => {
  if (event.detail > 1 && event.target.closest('button.once')) event.stopImmediatePropagation();
}, true)"""
HEAD = f"<script>{(Path(__file__).parent / 'components' / 'event_stream.js').read_text()}</script>"


def build_ui(lab: Lab) -> gr.Blocks:
    """The page: a tab per step of the loop, each built by its own module."""
    with gr.Blocks(title="Preference Lab", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as blocks:
        with gr.Tabs(elem_id="tabs"):
            for name, tab in TABS:
                with gr.Tab(name, id=name.lower(), elem_id=f"tab-{name.lower()}"):
                    tab.build(lab)
        phone(lab)
    return blocks


def phone(lab: Lab) -> None:
    """The link and its QR code for a phone in the same network; nothing where only this machine is served."""
    if is_loopback(lab.settings.host):
        return
    code = segno.make(lab.url(), micro=False).svg_inline(scale=5, border=2)
    with gr.Accordion("On a phone", open=False):
        gr.HTML(
            f'<div id="phone" style="text-align:center"><div style="background:#fff;display:inline-block">{code}</div>'
            f'<p><a href="{lab.url()}">{lab.url()}</a> in the same network; it asks for the password once.</p></div>'
        )
