"""A stage of the pipeline as a record.

The record gives the stage's command line, its part of dvc.yaml, its Kubeflow step and its place in `cross-validate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distilldsm.core.errors import ConfigError
from distilldsm.core.shipped import shipped

Scope = Literal["data", "fold", "folds", "model"]
"""How often a stage runs: once for the data, once per fold, once over all folds, or once per model that passed the
gate."""
Kind = Literal["Dataset", "Model", "HTML", "Markdown", "Metrics", "ClassificationMetrics"]
"""Type of an artifact in Kubeflow Pipelines."""

WORK_VARIABLE = "DISTILLDSM_WORK_DIR"
"""Environment variable: a folder that remains after a pod ends. An interrupted training resumes from it."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A table of numbers that DVC draws. Only these of DVC's fields are used."""

    template: str
    """A template of DVC, or one in `.dvc/plots`."""
    x: str
    y: str
    title: str
    """`{fold}` stands for the fold's number."""
    x_label: str | None = None
    y_label: str | None = None


@dataclass(frozen=True, kw_only=True)
class Input:
    """A directory or file that a stage reads."""

    name: str
    """Key in `inputs`, and the option of the command line."""
    path: str
    """Where it lies by default; `{fold}` stands for the fold's number."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Name in the manifest to the file that is read; empty: the stage reads the whole directory."""
    optional: bool = False
    """The stage also runs without this input."""
    per_fold: bool = False
    """The directory holds `fold0`, `fold1` ...; the stage reads the configured folds."""

    def hashed(self, place: Path, folds: Iterable[int]) -> dict[str, Path]:
        """Name in the manifest to the file or directory to hash."""
        if self.per_fold:
            return {f"{self.name}{fold}": place / f"fold{fold}" for fold in folds}
        found = {name: place / file for name, file in self.files.items()} or {self.name: place}
        return {name: path for name, path in found.items() if path.exists() or not self.optional}


@dataclass(frozen=True, kw_only=True)
class Output:
    """An output of a stage. The first one is the directory; the others are files in it that DVC or Kubeflow shows."""

    name: str
    path: str
    """Where it lies by default; `{fold}` stands for the fold's number."""
    kind: Kind | None
    """None: Kubeflow does not show it as a separate artifact."""
    parts: tuple[str, ...] = ()
    """Files and folders of a directory that are not metrics or plots. DVC needs metrics and plots listed separately."""
    metric: bool = False
    """DVC shows it as metrics."""
    plot: Plot | None = None
    """How DVC draws it."""
    keys: tuple[str, ...] = ()
    """Metrics that Kubeflow shows; empty: all numbers."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """A path on the command line, in addition to the inputs. The option may be repeated."""

    name: str
    """Keyword of `run`, and the option of the command line."""
    metavar: str
    help: str


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Everything known about a stage before it runs."""

    name: str
    help: str
    """One line, for `--help`, dvc.yaml and Kubeflow."""
    section: str
    """Section of params.yaml with the stage's parameters."""
    also: tuple[str, ...] = ()
    """Parameters of other sections that the stage reads, e.g. train.budget. `run` gets them by their last word."""
    inputs: tuple[Input, ...] = ()
    outputs: tuple[Output, ...]
    options: tuple[Option, ...] = ()
    scope: Scope
    image: Literal["data", "train", "export"]
    """Role of the container image that runs it."""
    run: Callable[..., None]
    """`run(config, inputs, outputs)`, and the options by name. Also `fold=` for the scopes fold and model, and
    `tracking=` for every scope but data."""
    code: tuple[str, ...]
    """Folders of the package that can change the output. If code there changes, the stage runs again."""
    files: tuple[str, ...] = ()
    """Parameters of the config that hold the path of a file, or null."""
    facts: Callable[[Mapping[str, Path], Path], Mapping[str, Any]] | None = None
    """`facts(inputs, output)`: values that Kubeflow shows on the page of the output."""
    outdated: Callable[[Any, Path], bool] | None = None
    """`outdated(config, output)`: whether something outside the pipeline changed since the output was made."""
    distributed: bool = False
    """The stage may run on several processes and machines, and resumes where it was interrupted."""

    @property
    def output(self) -> Output:
        """The directory that the stage writes."""
        return self.outputs[0]

    @property
    def per_fold(self) -> bool:
        """Whether it runs for one fold at a time."""
        return self.scope in ("fold", "model")

    @property
    def code_paths(self) -> tuple[str, ...]:
        """The stage's own file and `code`, relative to the package."""
        return (f"components/{self.name}.py", *self.code)

    def shown(self) -> dict[str, Output]:
        """File name in the output directory to its record."""
        return {one.path.removeprefix(f"{self.output.path}/"): one for one in self.outputs[1:]}

    @property
    def also_by_name(self) -> dict[str, str]:
        """Keyword of `run` to the parameter of another section."""
        return {key.rpartition(".")[2]: key for key in self.also}

    def key(
        self,
        config: Any,
        inputs: Mapping[str, Path],
        fold: int | None = None,
        *,
        also: Mapping[str, Any] | None = None,
        **options: Iterable[Path],
    ) -> dict[str, Any]:
        """Everything that decides the output, for `output_directory` and `is_current`.

        Args:
            also: the values of the parameters in `also`, by their last word.

        Raises:
            ConfigError: a parameter of `files` names a file that does not exist.
        """
        folds = getattr(config, "folds", ()) if self.scope == "folds" else ()
        hashed: dict[str, Path] = {}
        for one in self.inputs:
            if one.name in inputs:
                hashed |= one.hashed(inputs[one.name], folds)
        for name, paths in options.items():
            hashed |= {f"{name}{number}": path for number, path in enumerate(paths, start=1)}
        for name in self.files:
            hashed |= self._file(name, getattr(config, name))
        extra = ({"fold": fold} if self.per_fold else {}) | dict(also or {})
        return {"stage": self.name, "config": config, "inputs": hashed, "extra": extra, "code": self.code_paths}

    def keep_apart(self, output: Path, **places: Path | None) -> None:
        """Check that files and folders that parameters name do not lie in the output.

        Raises:
            ConfigError: one of them does.
        """
        output = output.resolve()
        for name, place in places.items():
            if place is not None and output in (place.resolve(), *place.resolve().parents):
                raise ConfigError(
                    "lies in the stage's output, which is replaced at each run",
                    where=f"{self.section}.{name}",
                    seen=str(place),
                    rule=f"a place outside {output}",
                    hint="copy it elsewhere",
                )

    def _file(self, name: str, path: str | None) -> dict[str, Path]:
        if path and not shipped(path).is_file():
            where = f"{self.section}.{name}"
            raise ConfigError("no such file", where=where, seen=path, hint="correct the path, or leave it out")
        return {name: shipped(path)} if path else {}
