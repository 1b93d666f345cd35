"""`python -m app.worker` whose trainings are tests/fakes/lpo.py."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from app import worker, worker_training  # noqa: E402

worker_training.COMMAND = [sys.executable, str(ROOT / "tests" / "fakes" / "lpo.py")]
raise SystemExit(worker.main())
