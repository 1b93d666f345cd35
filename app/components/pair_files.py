"""The script of the pair picker, joined from its files. Apart from pair_picker.py, so that a page without Gradio can
have it too."""

from pathlib import Path

FOLDER = Path(__file__).parent
# They run in one function, one after the other: the picker last, because it uses the others at once.
SCRIPTS = ("outbox", "preload", "words", "room", "flicker", "keys", "name", "picker")


def script() -> str:
    return "".join((FOLDER / f"pair_{name}.js").read_text() for name in SCRIPTS)
