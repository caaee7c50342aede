"""Goes on with a finished training: from its last weights, with the tail of a schedule of the whole new length."""

from __future__ import annotations

import shutil
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distilldsm.config import TrainConfig
from distilldsm.core.errors import DataError
from distilldsm.core.files import read_json
from distilldsm.training.setup import Settings

LAST, BEST = "last.safetensors", "best.safetensors"
HISTORY = "history.json"
"""One record per epoch. The file is rewritten after each epoch."""
TRAINING_SHARE = 0.9
"""The share of the time that is left for epochs: validations and checkpoints take the rest."""


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A finished training, and the number of epochs to add.

    The optimizer's state is not kept with a finished model, so it starts anew; and the heads of deep supervision, which
    are no part of the model, are left out.
    """

    model: Path
    """The directory of the finished training."""
    epochs: int

    @classmethod
    def for_time(cls, model: Path, seconds: float) -> Continuation:
        """As many epochs as the time holds, at least one, by the median time of the finished epochs.

        Raises:
            DataError: the directory holds no finished training.
        """
        if not (model / LAST).is_file():
            raise DataError(
                "holds no finished training", where=model, rule=LAST, hint="train first, without continuing"
            )
        epoch_s = statistics.median(record["seconds"] for record in read_json(model / HISTORY))
        return cls(model=model, epochs=max(1, int(seconds * TRAINING_SHARE / epoch_s)))

    @property
    def history(self) -> list[dict[str, Any]]:
        """The records of the finished epochs."""
        records: list[dict[str, Any]] = read_json(self.model / HISTORY)
        return records

    def settings(self, of_first: Settings) -> Settings:
        """The settings, with the epochs of both trainings."""
        return replace(of_first, epochs=len(self.history) + self.epochs)

    def config(self, of_first: TrainConfig) -> TrainConfig:
        """The config, with the finished training's last weights as the initial ones."""
        weights = str(self.model / LAST)
        return replace(of_first, initial_weights=weights, initial_weights_strict=True, deep_supervision=0)

    def state(self, work: Path, steps_per_epoch: int) -> dict[str, Any]:
        """The values of the training's state after the finished epochs. Copies the best weights so far to `work`."""
        scores = [record["val_dice_mean"] for record in self.history if "val_dice_mean" in record]
        shutil.copyfile(self.model / BEST, work / BEST)
        done = len(self.history)
        best = max(scores, default=-1.0)
        return {"epoch": done, "step": done * steps_per_epoch, "best_dice": best, "history": self.history}
