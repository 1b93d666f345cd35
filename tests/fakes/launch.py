"""`launch.py` whose training worker is tests/fakes/worker.py; no interactive worker, which would import torch."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import launch  # noqa: E402
from app import supervisor  # noqa: E402

supervisor.WORKER = [sys.executable, str(ROOT / "tests" / "fakes" / "worker.py")]
supervisor.LANES = ("training",)
raise SystemExit(launch.main())
