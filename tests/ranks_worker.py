"""What tests/test_ranks.py starts twice, as two ranks of one group:  torchrun ... tests/ranks_worker.py FOLDER

Trains an LRM, then a small LPO whose rounds have fewer prompts than ranks, then lets the second rank fail.
"""

import sys
from pathlib import Path

from lpo import commands
from lpo.lpo_trainer import LPOTrainer
from lpo.lrm_trainer import LRMTrainer
from lpo.ranks import Ranks, join
from lpo.run_dir import Run
from lpo.training import run_training
from tests.test_ranks import few_prompts, lrm_settings


class Breaks(LRMTrainer):
    """Fails on the second rank only, after the first step."""

    def train(self):
        for metrics in super().train():
            if not self.ranks.main:
                raise ValueError("The second GPU fell off the bus.")
            yield metrics


def begin(path: Path, ranks: Ranks) -> Run:
    run = Run.create(path, {}) if ranks.main else Run(path, writes=False)
    ranks.any(False)
    return run


def main(folder: Path) -> int:
    ranks = join("cpu")
    assert ranks.count == 2 and ranks.device == "cpu"
    for name, config, trainer in (("lrm", lrm_settings(folder), LRMTrainer), ("few", few_prompts(folder), LPOTrainer)):
        run = begin(folder / f"{name}-two", ranks)
        assert run_training(trainer(config, run, ranks), run, resume=False) == 0
    commands.TRAINERS["train-lrm"] = Breaks
    run = begin(folder / "broken", ranks)
    code = commands._guarded("train-lrm", lrm_settings(folder), run, ranks, resuming=False)
    print(f"rank 0 ends with {code}", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
