"""The small object that every tab and route gets: where things are, and which study is being worked on.

It holds no state of its own beyond the command line's settings: everything that must survive is in the storage.
"""

import json
import socket
from dataclasses import dataclass
from pathlib import Path

from sqlmodel import select

import storage
from app.security import Signer
from storage import labels
from storage.models import Setting, Study

ROOT = Path(__file__).resolve().parent.parent
SCENES_PROMPTS = ROOT / "lpo" / "scenes" / "prompts.json"
SCENES_SALT = "scenes"  # the split that the embedded base and its warm LRM were trained under: never change it
SCENES_QUESTION = "Which picture is better for the prompt?"
CURRENT_STUDY = "current_study"


@dataclass(frozen=True)
class Settings:
    """What the command line said. `device` is handed to the jobs as it is ("auto", "cpu", "cuda", "cuda:1", "mps")."""

    data_dir: Path
    host: str = "127.0.0.1"
    port: int = 7860
    password: str | None = None
    device: str = "auto"
    workers: bool = True


class Lab:
    """`store` is the open storage, `settings` the command line, `signer` signs cookies with this data folder's key."""

    def __init__(self, store: "storage.Storage", settings: Settings):
        self.store = store
        self.settings = settings
        self.signer = Signer(Path(settings.data_dir))

    def studies(self) -> list[Study]:
        """All studies, oldest first."""
        with self.store.reader() as session:
            return list(session.exec(select(Study).order_by(Study.id)).all())

    def current_study(self) -> Study:
        """The study that the tabs work on: the one last chosen, else the oldest, else a new Scenes study."""
        with self.store.reader() as session:
            chosen = session.get(Setting, CURRENT_STUDY)
            study = session.get(Study, chosen.value) if chosen else None
            study = study or session.exec(select(Study).order_by(Study.id)).first()
        return study or self._create_scenes_study()

    def choose_study(self, study_id: int) -> Study:
        """Makes `study_id` the current study of this data folder. ValueError if there is no such study."""
        with self.store.session() as session:
            study = session.get(Study, study_id)
            if study is None:
                raise ValueError(f"There is no study {study_id}; choose one of the list.")
            session.merge(Setting(key=CURRENT_STUDY, value=study_id))
        return study

    def url(self) -> str:
        """The address for a person: this machine's own name for a loopback host, else one that a phone can reach."""
        host = self.settings.host
        if host in ("0.0.0.0", "::"):
            host = _lan_address()
        return f"http://{f'[{host}]' if ':' in host else host}:{self.settings.port}"

    def _create_scenes_study(self) -> Study:
        prompts = json.loads(SCENES_PROMPTS.read_text())
        study = labels.create_study(self.store, "Scenes", base="scenes", question=SCENES_QUESTION, salt=SCENES_SALT)
        labels.add_prompts(self.store, study.id, prompts["train"] + prompts["heldout"])
        return study


def _lan_address() -> str:
    """This machine's address in the local network: the one that the system would send from (nothing is sent)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError:  # no network at all
            return socket.gethostname()
