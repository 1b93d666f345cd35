"""The verdict of a comparison as a small picture: wins, ties and losses as one bar, and the interval on a scale."""

from html import escape

from app.statistics import WinRate, percent

NARROW = 0.1  # share of the bar in which the number stands without its word
STYLE = """
.vd { font-size: 13px; color: var(--body-text-color); display: grid; gap: 8px 36px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.vd-names { display: flex; justify-content: space-between; gap: 16px; font-weight: 600; font-size: 15px;
  margin-bottom: 4px; }
.vd-bar { display: flex; height: 34px; border-radius: 6px; overflow: hidden; gap: 2px; }
.vd-bar span { display: flex; align-items: center; justify-content: center; min-width: 0; overflow: hidden;
  white-space: nowrap; font-size: 13px; }
.vd-a { background: #4f46e5; color: #fff; }
.vd-t { background: #cbd5e1; color: #334155; }
.vd-b { background: #ea580c; color: #fff; }
.vd svg { display: block; width: 100%; height: 62px; overflow: visible; }
.vd svg text { font-size: 12px; fill: var(--body-text-color-subdued); }
.vd svg .vd-axis { stroke: var(--border-color-primary); }
.vd svg .vd-half { stroke: var(--body-text-color-subdued); stroke-dasharray: 3 3; }
.vd svg .vd-span { stroke: var(--body-text-color); stroke-width: 3; stroke-linecap: round; }
.vd svg .vd-dot { fill: var(--body-text-color); }
.vd svg .vd-value { fill: var(--body-text-color); font-weight: 600; }
.vd-words { font-size: 15px; line-height: 1.45; margin: 0 0 4px; }
.vd-small { color: var(--body-text-color-subdued); font-size: 12px; line-height: 1.4; margin-top: 5px; }
"""


def picture(result: WinRate, a: str, b: str, words: str, remarks: list[str]) -> str:
    """Escaped HTML: the bar (A left, B right), the interval of A's share below it, the words, then the remarks."""
    ties = result.ties + result.both_bad
    parts = (("a", result.wins, "win"), ("t", ties, "tie"), ("b", result.losses, "win"))
    total = sum(count for _, count, _ in parts)
    bar = "".join(
        f'<span class="vd-{name}" style="flex:{count}" title="{_many(count, word)}">'
        f"{_many(count, word) if count > NARROW * total else count}</span>"
        for name, count, word in parts
        if count
    )
    small = "".join(f'<div class="vd-small">{escape(remark)}</div>' for remark in remarks if remark)
    counts = f"{result.wins} to {result.losses}, {_many(ties, 'tie')}"
    return (
        f'<div class="vd"><div><div class="vd-names"><span>{escape(a)}</span><span>{escape(b)}</span></div>'
        f'<div class="vd-bar" role="img" aria-label="{counts}">{bar}</div>'
        f'{_scale(result, a)}</div><div><div class="vd-words">{escape(words)}</div>{small}</div></div>'
    )


def _many(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _scale(result: WinRate, a: str) -> str:
    """The interval of A's share from 0 to 100 %; drawn in percent of the width, so that it follows the page.

    The bar above has A on the left, so a larger share of A reaches further right, as the bar's left part does.
    """
    ticks = "".join(
        f'<line class="vd-axis" x1="{x}%" x2="{x}%" y1="26" y2="31"/>'
        f'<text x="{x}%" y="45" text-anchor="{ {0: "start", 100: "end"}.get(x, "middle") }">{x} %</text>'
        for x in (0, 25, 50, 75, 100)
    )
    low, rate, high = 100 * result.low, 100 * result.rate, 100 * result.high
    anchor = "start" if rate < 12 else "end" if rate > 88 else "middle"
    return (
        f'<svg role="img" aria-label="{escape(a)} has {percent(result.rate)}, interval {percent(result.low)} to '
        f'{percent(result.high)}"><line class="vd-axis" x1="0%" x2="100%" y1="26" y2="26"/>{ticks}'
        f'<line class="vd-half" x1="50%" x2="50%" y1="2" y2="26"/>'
        f'<line class="vd-span" x1="{low:.2f}%" x2="{high:.2f}%" y1="26" y2="26"/>'
        f'<circle class="vd-dot" cx="{rate:.2f}%" cy="26" r="6"/>'
        f'<text class="vd-value" x="{rate:.2f}%" y="15" text-anchor="{anchor}">{percent(result.rate)}</text>'
        f'<text x="0%" y="61">share of {escape(a)}, ties counted half, with its 95 % interval</text></svg>'
    )
