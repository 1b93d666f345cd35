"""Files that a person gives the lab: uploads, which are hostile and get names of our own, and paths on this machine."""

import re
import shutil
import uuid
from pathlib import Path

from app.lab import Lab
from app.security import is_loopback

INBOX = "inbox"  # below the data folder: what a lab that others can reach may import by path


def take_over(lab: Lab, paths: list[str], endings: tuple[str, ...], wanted: str) -> dict:
    """Copies uploaded files into the lab; returns {"upload", "name"} for a job's config.

    Several files must all be .parquet: the parts of one data set, kept together in a folder. `wanted` says in the
    ValueError's sentence what to choose.
    """
    names = [Path(path).name for path in paths]
    for name in names:
        if Path(name).suffix.lower() not in endings:
            raise ValueError(f"{name[:80]} is not a {' or '.join(endings)} file; {wanted}.")
    if len(names) > 1 and {Path(name).suffix.lower() for name in names} != {".parquet"}:
        raise ValueError("Several files at once are taken as the parts of one data set; choose .parquet files only.")
    if len({_own(name) for name in names}) < len(names):
        raise ValueError("Two of the files have the same name; rename one of them.")
    upload = uuid.uuid4().hex
    title = _own(names[0]) if len(names) == 1 else Path(_own(sorted(names)[0])).stem
    folder = lab.store.cache_dir / "uploads" / upload
    into = folder if len(names) == 1 else folder / title
    into.mkdir(parents=True)
    for path, name in zip(paths, names, strict=True):
        shutil.copyfile(path, into / _own(name))
    return {"upload": upload, "name": title}


def _own(name: str) -> str:
    return re.sub(r"[^\w .()-]", "_", Path(name).stem)[:80] + Path(name).suffix.lower()


def local_path(lab: Lab, text: str) -> Path:
    """The file or folder of this machine that a person named. Where others can reach the page, only the lab's own
    inbox is read. Raises ValueError."""
    path = Path(text.strip()).expanduser()
    inbox = Path(lab.store.data_dir) / INBOX
    path = (path if path.is_absolute() else inbox / path).resolve()
    if not is_loopback(lab.settings.host) and not path.is_relative_to(inbox.resolve()):
        raise ValueError(
            f"This page can be reached from other machines, so only what lies in {inbox} is read; put it there."
        )
    if not path.exists():
        raise ValueError(f"There is no file or folder {path} on the machine that runs the lab; correct the path.")
    return path
