"""The list of comparisons, newest first, each with its state or verdict; a click chooses one."""

from html import escape

import gradio as gr

from app import comparisons
from app.lab import Lab
from storage import comparisons as stored
from storage.browse import day

STYLE = """
table { width: 100%; border-collapse: collapse; font-size: 13px; }
th { text-align: left; font-weight: 500; color: var(--body-text-color-subdued); padding: 4px 8px; font-size: 12px; }
td { padding: 5px 8px; border-top: 1px solid var(--border-color-primary); overflow-wrap: anywhere; }
tbody tr { cursor: pointer; }
tbody tr:hover, tbody tr:focus-visible { background: var(--background-fill-secondary); outline: none; }
.cl-chosen td { background: var(--background-fill-secondary); }
p { color: var(--body-text-color-subdued); }
"""
CLICK = """
const pick = (event) => {
  const row = event.target.closest('[data-id]');
  if (row) trigger('select', { item: Number(row.dataset.id) });
};
element.addEventListener('click', pick);
element.addEventListener('keydown', (event) => { if (event.key === 'Enter') pick(event); });
"""


def build() -> gr.HTML:
    """The component; `.select(f)` with `f(event: gr.EventData)` reads the comparison's id as `event.item`."""
    return gr.HTML(css_template=STYLE, js_on_load=CLICK, apply_default_css=False, elem_id="compare-list")


def table(lab: Lab, chosen: int | None) -> str:
    """The list as escaped HTML. Which policy made which picture is nowhere in it."""
    rows = stored.list_comparisons(lab.store, lab.current_study().id)
    if not rows:
        return "<p>No comparison yet.</p>"
    lines = []
    for row in rows[:200]:
        a, b = comparisons.names(lab, row)
        plan = row.plan
        size = f"{len(plan['prompts'])} × {len(plan['seeds'])}" + (
            ", peeking" if plan.get("peeking") else f", {plan['votes']} votes"
        )
        cells = (f"#{row.id}", day(row.created_at), f"{a} against {b}", size, comparisons.verdict_words(lab, row))
        mark = ' class="cl-chosen"' if row.id == chosen else ""
        lines.append(
            f'<tr data-id="{row.id}" tabindex="0"{mark}>' + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>"
        )
    head = "".join(f"<th>{name}</th>" for name in ("", "When", "Policies", "Prompts × seeds", "Verdict"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
