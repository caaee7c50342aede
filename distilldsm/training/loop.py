"""The training loop, top to bottom: load, step, average, validate, save."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distilldsm.config import TrainConfig
from distilldsm.core.errors import DataError, UserError
from distilldsm.core.files import write_json
from distilldsm.core.interruption import explains_interrupt
from distilldsm.core.progress import Meter, duration, memory_text, meter
from distilldsm.data.plan import Plan
from distilldsm.data.splits import load_fold
from distilldsm.inference.engines import TorchEngine
from distilldsm.models.checkpoint import load_tensors, load_weights, pack_optimizer, save_tensors, unpack_optimizer
from distilldsm.training.augment import Draws, augment, centre_crop, changes_nothing
from distilldsm.training.continuation import BEST, HISTORY, LAST, Continuation
from distilldsm.training.deep_supervision import DeeplySupervised, supervised_loss
from distilldsm.training.distributed import Processes, share_batch_statistics
from distilldsm.training.ema import WeightAverage
from distilldsm.training.initial_weights import load_initial_weights
from distilldsm.training.loading import batch_size_of, batches, loaders_are_watched
from distilldsm.training.losses import segmentation_loss
from distilldsm.training.patches import PatchSampler
from distilldsm.training.schedule import Plateau, learning_rate_at
from distilldsm.training.setup import (
    Settings,
    build_network,
    choose_bf16,
    choose_device,
    hash_seed,
    make_optimizer,
    seed_everything,
)
from distilldsm.training.validation import spread, validate

RESUME = "resume.safetensors"
__all__ = ["BEST", "HISTORY", "LAST", "RESUME", "Trainer", "TrainingState"]

EpochCallback = Callable[[Mapping[str, Any]], None]


@dataclass
class TrainingState:
    """The state of a training besides its tensors; plain JSON types only."""

    epoch: int = 0
    """Number of finished epochs."""
    step: int = 0
    """Number of optimizer steps so far."""
    best_dice: float = -1.0
    validations_without_gain: int = 0
    batch_size: int = 0
    """Patches per step, over all processes; 0: before the first step."""
    history: list[dict[str, Any]] = field(default_factory=list)
    plateau: dict[str, float] = field(default_factory=dict)


class Trainer:
    """One training run of one fold.

    Args:
        config: the `train` section.
        preprocessed: the directory from the preprocess stage.
        work: directory for checkpoints. If it holds `resume.safetensors`, the training resumes from it.
        fold: number of the held-out fold.
        processes: this process among all training processes.
        on_epoch: called in the main process with each epoch's record.
        continued: the finished training to go on with; None: a new training.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        preprocessed: Path,
        work: Path,
        fold: int,
        processes: Processes | None = None,
        on_epoch: EpochCallback | None = None,
        continued: Continuation | None = None,
    ) -> None:
        self.work = work
        self.preprocessed = preprocessed
        self.processes = processes or Processes()
        self.on_epoch = on_epoch
        self.plan = Plan.load(preprocessed / "plan.json")
        train_ids, self.held_out = load_fold(preprocessed / "splits.json", fold)
        self.settings = Settings.of(config, self.plan, len(train_ids))
        if continued:
            self.settings, config = continued.settings(self.settings), continued.config(config)
        self.config = config = self.settings.filled(config)
        self.device = choose_device(config.device, self.processes.local_rank)
        self.bf16 = choose_bf16(config.precision, self.device)
        seed_everything(config.seed, deterministic=config.deterministic)
        targets = self.plan.targets
        self.regions = torch.from_numpy(targets.membership()) if targets.regions else None
        self.network = build_network(config, self.plan, self.device)
        checkpoint = self._read_checkpoint()
        resumed = checkpoint is not None
        if config.initial_weights is not None and not resumed:
            path = Path(config.initial_weights)
            others = load_initial_weights(self.network, path, strict=config.initial_weights_strict)
            self._say(f"starts from {path}" + (f"; new: {', '.join(others)}" if others else ""))
        self.cost = self.network.cost()
        self.average = WeightAverage(self.network, self.settings.ema_decay)
        self.trained: nn.Module = self.network
        if config.deep_supervision and not self.network.decoder_widths:
            self._say(f"{config.model.name} has no known decoder levels: trained without train.deep_supervision")
        elif config.deep_supervision:
            self.trained = DeeplySupervised(self.network, config.deep_supervision).to(self.device)
        self.optimizer = make_optimizer(config, self.trained, self.settings.learning_rate)
        self.plateau, self.state = Plateau(), TrainingState()
        if checkpoint is not None:
            self._resume(*checkpoint)
        self.sampler = self._make_sampler(train_ids)
        if continued and not resumed:
            vars(self.state).update(continued.state(work, self.sampler.steps_per_epoch))
        self.total_steps = self.settings.epochs * self.sampler.steps_per_epoch
        self.parallel = self._wrap()

    def _say(self, text: str) -> None:
        if self.processes.is_main:
            print(f"train: {text}", file=sys.stderr)

    def _make_sampler(self, train_ids: list[str]) -> PatchSampler:
        self.state.batch_size = batch_size_of(
            self.config.batch_size,
            begun_with=self.state.batch_size,
            planned=self.plan.batch_size,
            unit=self.processes.world * self.config.accumulate,
        )
        spatial = self.config.augment.spatial_probability + self.config.augment.elastic_probability > 0
        return PatchSampler(
            self.preprocessed,
            train_ids,
            patch_size=self.plan.patch_size,
            stride=self.network.stride,
            foreground_oversampling=self.settings.foreground_oversampling,
            samples_per_case=self.settings.samples_per_case,
            batch_size=self.state.batch_size,
            seed=self.config.seed,
            **({} if spatial else {"margin": 1.0}),
        )

    def _wrap(self) -> nn.Module:
        network = self.trained
        if self.processes.world > 1:
            network = share_batch_statistics(network, self.device.type)
            ids = [self.processes.local_rank] if self.device.type == "cuda" else None
            network = DistributedDataParallel(network, device_ids=ids)
        if self.config.compile:
            network = torch.compile(network, dynamic=True)  # type: ignore[assignment]
        return network

    def run(self) -> TrainingState:
        """Train to the end, write `last` and `best` weights and `history.json`, return the final state.

        `RESUME` stays, because the caller's next steps may be interrupted, too. The caller must remove it.
        """
        with explains_interrupt(self._kept):
            self._run_epochs()
        if self.processes.is_main:
            self._save_weights(LAST)
            if not (self.work / BEST).exists():
                self._save_weights(BEST)
            write_json(self.work / HISTORY, self.state.history)
            self._save_resume()
        self.processes.barrier()
        return self.state

    def _run_epochs(self) -> None:
        begun = last_saved = time.monotonic()
        first = self.state.epoch
        for epoch in range(first, self.settings.epochs):
            if 0 < self.config.early_stopping <= self.state.validations_without_gain:
                break
            record = self._train_epoch(epoch)
            final = epoch + 1 == self.settings.epochs
            if final or (epoch + 1) % self.settings.validate_every == 0:
                self._validate(record, final=final)
            self.state.epoch = epoch + 1
            self.state.history.append(record | {"unix_seconds": round(time.time(), 3)})
            if self.processes.is_main:
                write_json(self.work / HISTORY, self.state.history)
                a_epoch_s = (time.monotonic() - begun) / (epoch + 1 - first)
                self._print(record, seconds_left=a_epoch_s * (self.settings.epochs - epoch - 1))
                if self.on_epoch is not None:
                    self.on_epoch(record)
                if time.monotonic() - last_saved >= self.config.checkpoint_minutes * 60:
                    self._save_resume()
                    last_saved = time.monotonic()

    def _kept(self) -> str:
        """The message of an interrupted training: it will resume after the last checkpoint, not the last epoch."""
        path = self.work / RESUME
        epoch = load_tensors(path)[1]["state"]["epoch"] if path.exists() else 0
        more = self.state.epoch - epoch
        again = f"; {more} since the last checkpoint are trained again (train.checkpoint_minutes)" if more else ""
        return f"train: {epoch} of {self.settings.epochs} epochs are kept{again}"

    def _meter(self, number: int, what: str, total: int, unit: str) -> AbstractContextManager[Meter]:
        """A progress line during epoch `number`; it disappears afterwards. `_print` writes the epoch's final line."""
        title = f"epoch {number}/{self.settings.epochs}{what}"
        return meter(total=total, title=title, unit=unit, brief=True, shown=self.processes.is_main)

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        self.network.train()
        started = time.perf_counter()
        total = torch.zeros(2, dtype=torch.float64)
        rate = self.settings.learning_rate
        waited, asked = 0.0, started
        with (
            loaders_are_watched(self.config.workers),
            self._meter(epoch + 1, "", self.sampler.steps_per_epoch, "step") as shown,
        ):
            for images, labels, size, step in batches(self.sampler, epoch, self.config.workers, self.processes):
                waited += time.perf_counter() - asked
                rate = self._set_learning_rate()
                loss = self.step(images, labels, size, epoch, step)
                total += torch.tensor([loss, 1.0], dtype=torch.float64)
                self.state.step += 1
                self.average.update(self.network, self.state.step)
                shown.advance(note=f"loss {loss:.4f}")
                asked = time.perf_counter()
        loss = float(total[0] / total[1])
        self.plateau.update(loss)
        return {
            "epoch": epoch + 1,
            "train_loss": round(loss, 6),
            "learning_rate": float(f"{rate:.4g}"),
            "seconds": round(time.perf_counter() - started, 3),
            "loading_seconds": round(waited, 3),
        }

    def step(self, images: np.ndarray, labels: np.ndarray, size: tuple[int, int, int], epoch: int, step: int) -> float:
        """Do one optimizer step; return the mean loss over all processes."""
        x, y = self._augment(images, labels, size, self._draws(epoch, step))
        parts = self.config.accumulate
        loss_sum = torch.zeros(1, device=self.device)
        for k, (part_x, part_y) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
            last = k == parts - 1
            # Gradients are exchanged once per step, with the last part.
            sync = nullcontext() if last or self.processes.world == 1 else self.parallel.no_sync()  # type: ignore[operator]
            with sync:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    outputs = self.parallel(part_x)
                loss = supervised_loss(outputs, part_y, self._loss)
                loss_sum += loss.detach() / parts
                (loss / parts).backward()
        mean = float(self.processes.sum(loss_sum)) / self.processes.world
        if not math.isfinite(mean):
            # Every rank sees the same sum. So all ranks stop here, and none waits for another.
            raise UserError(
                "the loss is not finite; this step did not change the weights",
                where=f"epoch {epoch + 1}, step {step + 1}",
                seen=mean,
                hint="lower train.learning_rate, or set train.precision: fp32; check the data's intensities",
            )
        if self.config.gradient_clip_norm:
            nn.utils.clip_grad_norm_(self.trained.parameters(), self.config.gradient_clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return mean

    def _draws(self, epoch: int, step: int) -> Draws:
        """Random numbers for this process's share of a step's batch."""
        rank, world = self.processes.rank, self.processes.world
        common = torch.Generator().manual_seed(hash_seed(self.config.seed, epoch, step, 0))
        own = torch.Generator().manual_seed(hash_seed(self.config.seed, epoch, step, rank, world))
        return Draws(common, rank, world, noise=own if world > 1 else None)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return segmentation_loss(
            logits,
            labels,
            dice_weight=self.config.dice_weight,
            cross_entropy_weight=self.config.cross_entropy_weight,
            regions=self.regions,
            over_processes=self.processes.differentiable_sum if self.processes.world > 1 else None,
        )

    def _augment(
        self, images: np.ndarray, labels: np.ndarray, size: tuple[int, int, int], draws: Draws
    ) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy(images).to(self.device, torch.float32, non_blocking=True)
        y = torch.from_numpy(labels).to(self.device, non_blocking=True)
        settings = self.config.augment
        if changes_nothing(settings):
            return centre_crop(x, y, size)
        return augment(
            x,
            y,
            size,
            settings,
            classes=len(self.plan.class_names),
            spacing_mm=self.plan.target_spacing_mm,
            coarse_slices=self.plan.coarse_slices,
            generator=draws,
        )

    def _set_learning_rate(self) -> float:
        rate = self.plateau.factor * learning_rate_at(
            self.state.step,
            total_steps=self.total_steps,
            peak=self.settings.learning_rate,
            schedule=self.config.schedule,
            warmup_fraction=self.config.warmup_fraction,
        )
        if self.config.schedule != "plateau":
            rate /= self.plateau.factor
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _validate(self, record: dict[str, Any], *, final: bool) -> None:
        """Score the held-out volumes; after the last epoch also training volumes, to compare with."""
        record |= self._scores("val", self.held_out, record["epoch"])
        if final:
            record |= self._scores("train", spread(self.sampler.case_ids, len(self.held_out)), record["epoch"])
        mean = record["val_dice_mean"]
        if mean > self.state.best_dice:
            self.state.best_dice, self.state.validations_without_gain = mean, 0
            if self.processes.is_main:
                self._save_weights(BEST, epoch=record["epoch"])
        else:
            self.state.validations_without_gain += 1

    def _scores(self, name: str, cases: Sequence[str], epoch: int) -> dict[str, Any]:
        share = len(cases[self.processes.rank :: self.processes.world])
        with self._meter(epoch, ", validation", share, "case") as shown:
            engine = TorchEngine(self.average.network, device=self.device.type, bf16=self.bf16)
            scores = validate(engine, self.preprocessed, cases, self.plan.targets, self.processes, shown.advance)
        rounded = {label: round(value, 5) for label, value in scores.items()}
        return {f"{name}_dice": rounded, f"{name}_dice_mean": round(float(np.mean(list(scores.values()))), 5)}

    def _save_weights(self, name: str, epoch: int | None = None) -> None:
        meta = {
            "epoch": epoch or self.state.epoch,
            "model": {"name": self.config.model.name, "options": dict(self.config.model.options)},
        }
        save_tensors(self.work / name, self.average.network.state_dict(), meta)

    def _save_resume(self) -> None:
        tensors, optimizer = pack_optimizer(self.optimizer)
        tensors |= {f"network.{k}": v for k, v in self.trained.state_dict().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.network.state_dict().items()}
        tensors["rng.torch"] = torch.get_rng_state()
        self.state.plateau = self.plateau.state()
        save_tensors(self.work / RESUME, tensors, {"state": vars(self.state), "optimizer": optimizer, "version": 1})

    def _read_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The checkpoint of an interrupted training. None: there is none, or it is damaged."""
        path = self.work / RESUME
        try:
            return load_tensors(path) if path.exists() else None
        except DataError as error:
            self._say(f"{path} {error.problem}: {error.seen}; training starts again")
            if self.processes.is_main:
                path.unlink(missing_ok=True)
            return None

    def _resume(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        path = self.work / RESUME

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        load_weights(self.trained, part("network."), path)
        load_weights(self.average.network, part("average."), path)
        unpack_optimizer(self.optimizer, tensors, meta["optimizer"])
        torch.set_rng_state(tensors["rng.torch"])
        self.state = TrainingState(**meta["state"])
        if self.state.plateau:
            self.plateau.load(self.state.plateau)
        self._say(f"resuming after epoch {self.state.epoch}")

    def _print(self, record: Mapping[str, Any], *, seconds_left: float) -> None:
        dice = "  ".join(f"{name} {value:.4f}" for name, value in record.get("val_dice", {}).items())
        print(
            f"epoch {record['epoch']}/{self.settings.epochs}  loss {record['train_loss']:.4f}  "
            f"lr {record['learning_rate']:.2e}  {record['seconds']:.1f} s"
            # Katib's collector reads NAME=VALUE from a log.
            + (f"  Dice {dice}  val_dice_mean={record['val_dice_mean']:.6f}" if dice else "")
            + (f"  about {duration(seconds_left)} left, {memory_text()}" if seconds_left else ""),
            file=sys.stderr,
            flush=True,
        )
