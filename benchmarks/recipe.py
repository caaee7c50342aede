"""Trains variants of a recipe on one or more folds, several at a time, and collects the scores in a table.

    python -m benchmarks.recipe dataset=hippocampus download.source=PATH/Task04_Hippocampus.tar train.epochs=12 \\
        --variant base --variant "lr-8e-3: train.learning_rate=0.008" --fold 0 --jobs 2

The arguments are those of `distilldsm compose`; each variant adds its own. A stage with the same parameters in two
variants runs once; interrupted calls resume. All files are written below --work (default: build/recipe). There,
`results.csv` gets a row for each variant and fold. With several folds (--fold 0 1 2 3 4) the cross-validation table of
each variant is printed; folds of earlier calls are not computed again. Several variants are compared case by case with
the first one, as `distilldsm compare` does (also in `comparison.csv` and `comparison.png`). --ensemble adds the mean of
all variants' networks. A variant that was chosen this way must be reported on other folds, or on all (docs/recipe.md).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from filelock import FileLock

from benchmarks.pipeline import ROOT, machine

_LOCK = Lock()
ENSEMBLE = "mean of all"


def digest(*values: Any) -> str:
    """A short hash of parameters, for file names."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def compose(work: Path, overrides: list[str]) -> tuple[Path, dict[str, Any]]:
    """Write the parameters of a variant. Returns their file and their values. Stages find conf/ beside the file."""
    import yaml

    if not (work / "conf").exists():
        (work / "conf").symlink_to(ROOT / "conf")
    target = work / f"params-{digest(overrides)}.yaml"
    command = [sys.executable, "-m", "distilldsm", "compose", *overrides, "-o", str(target)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return target, yaml.safe_load(target.read_text())


def stage(work: Path, name: str, arguments: list[str], output: Path, threads: int) -> None:
    """Run a stage unless its output exists. Variants and parallel calls share outputs: only the first one computes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    log = work / "logs" / f"{name}-{output.name}.log"
    log.parent.mkdir(exist_ok=True)
    with FileLock(log.with_suffix(".lock")):
        if (output / "manifest.json").exists():
            return
        with open(log, "a") as stream:
            command = [sys.executable, "-m", f"distilldsm.components.{name}", *arguments]
            finished = subprocess.run(command, cwd=work, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    if finished.returncode:
        raise SystemExit(f"{name} failed; see {log}")


def data_folders(work: Path, params: dict[str, Any]) -> tuple[Path, Path, Path]:
    """Folders of the raw, validated and preprocessed data. Variants with the same parameters share them."""
    parts = [params["download"], params["validate"], [params["preprocess"], params["train"]["budget"]]]
    names = ("raw", "validation", "preprocessed")
    raw, checked, prepared = (work / f"{name}-{digest(*parts[: k + 1])}" for k, name in enumerate(names))
    return raw, checked, prepared


def run_variant(work: Path, name: str, overrides: list[str], fold: int, threads: int) -> tuple[Path, Path]:
    """Run all stages of one variant and fold up to evaluation. Returns the folders of the model and its evaluation."""
    path, params = compose(work, [*overrides, "tracking.enabled=false", "evaluate.save_masks=false"])
    raw, checked, prepared = data_folders(work, params)
    prepared_key = prepared.name.removeprefix("preprocessed-")
    trained = work / f"model-{digest(prepared_key, params['train'], fold)}"
    scored = work / f"evaluation-{digest(prepared_key, params['train'], params['evaluate'], fold)}"
    common = ["--params", str(path)]
    stage(work, "download", [*common, "--output", str(raw)], raw, threads)
    stage(work, "validate", [*common, "--dataset", str(raw), "--output", str(checked)], checked, threads)
    arguments = ["--dataset", str(raw), "--validation", str(checked), "--output", str(prepared)]
    stage(work, "preprocess", [*common, *arguments], prepared, threads)
    of_fold = ["--fold", str(fold)]
    arguments = [*of_fold, "--preprocessed", str(prepared), "--output", str(trained)]
    stage(work, "train", [*common, *arguments], trained, threads)
    arguments = [*of_fold, "--dataset", str(raw), "--preprocessed", str(prepared), "--model", str(trained)]
    stage(work, "evaluate", [*common, *arguments, "--output", str(scored)], scored, threads)
    history = json.loads((trained / "history.json").read_text())
    epochs = sorted(record["seconds"] for record in history)
    took = {
        "epochs": len(history),
        "seconds_per_epoch": epochs[len(epochs) // 2],
        "train_seconds": round(sum(epochs)),
    }
    tell(work, name, fold, scored, " ".join(overrides), took)
    return trained, scored


def average(
    work: Path, variants: list[tuple[str, list[str]]], models: list[Path], fold: int, threads: int
) -> tuple[Path, Path]:
    """Evaluate the ensemble of all variants. Returns the folders of the first model and of the evaluation."""
    overrides = [*variants[0][1], "tracking.enabled=false", "evaluate.save_masks=false"]
    path, params = compose(work, overrides)
    raw, _, prepared = data_folders(work, params)
    scored = work / f"evaluation-{digest('ensemble', [model.name for model in models], params['evaluate'], fold)}"
    arguments = ["--params", str(path), "--fold", str(fold), "--dataset", str(raw), "--preprocessed", str(prepared)]
    arguments += ["--model", str(models[0]), *(word for model in models[1:] for word in ("--ensemble", str(model)))]
    stage(work, "evaluate", [*arguments, "--output", str(scored)], scored, threads)
    tell(work, ENSEMBLE, fold, scored, " | ".join(" ".join(own) for _, own in variants), {})
    return models[0], scored


def tell(work: Path, name: str, fold: int, scored: Path, overrides: str, took: dict[str, Any]) -> None:
    """Add the scores of a fold to the table and print them."""
    metrics = json.loads((scored / "metrics.json").read_text())
    row = {
        "variant": name,
        "fold": fold,
        **{f"dice_{label}": value for label, value in metrics["dice"].items()},
        "hd95_mm": metrics["hd95_mm"]["mean"],
        **took,
        "evaluation": scored.name,
        "overrides": overrides,
    }
    with _LOCK:
        keep(work / "results.csv", row)
        shown = {k: v for k, v in row.items() if k not in ("overrides", "train_seconds", "evaluation")}
        print("  ".join(f"{k}={v}" for k, v in shown.items()), flush=True)


def table_of(name: str, folds: dict[int, tuple[Path, Path]]) -> str:
    """The table of a cross-validation. `folds` gives the folders of the model and the evaluation of each fold."""
    from distilldsm.evaluation.fold_table import format_table, summarise
    from distilldsm.evaluation.folds import load_folds

    with tempfile.TemporaryDirectory() as folder:
        for number, parts in folds.items():
            for kind, part in zip(("models", "evaluation"), parts, strict=True):
                Path(folder, kind).mkdir(exist_ok=True)
                Path(folder, kind, f"fold{number}").symlink_to(part)
        loaded = load_folds(list(folds), Path(folder, "evaluation"), Path(folder, "models"))
        return format_table(summarise(loaded), name)


def compare_variants(evaluations: dict[str, list[Path]], work: Path) -> str:
    """Compare the evaluated folds of every variant with those of the first one. Also writes the result below `work`."""
    from distilldsm.evaluation import comparison
    from distilldsm.evaluation.trainings import load_training

    trainings = [load_training(name, folders) for name, folders in evaluations.items()]
    rows = comparison.compare(trainings)
    comparison.write_comparison(rows, work / "comparison.csv")
    comparison.draw(trainings, work / "comparison.png")
    return comparison.format_comparison(rows)


def keep(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV table. It replaces an earlier row of the same variant, fold and overrides.

    Data sets have different labels: columns of other labels stay empty in the row.
    """
    same = ("variant", "fold", "overrides")
    with FileLock(path.with_name(f".{path.name}.lock")):  # parallel calls may write other folds
        rows = []
        if path.exists():
            with open(path, newline="") as stream:
                rows = list(csv.DictReader(stream))
        rows = [old for old in rows if any(str(old[key]) != str(row[key]) for key in same)] + [row]
        partial = path.with_name(f".{path.name}.partial")
        with open(partial, "w", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(dict.fromkeys(key for one in rows for key in one)))
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for distilldsm compose, for all variants")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME[: KEY=VALUE ...]")
    parser.add_argument("--fold", type=int, nargs="+", default=[0])
    parser.add_argument("--ensemble", action="store_true", help="also evaluate the mean of all variants' networks")
    parser.add_argument("--jobs", type=int, default=2, help="variants at a time; they share the cores")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "recipe")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    shared = [
        f"{key}={Path(value).resolve()}" if key == "download.source" and Path(value).exists() else o
        for o in args.overrides
        for key, _, value in [o.partition("=")]
    ]
    variants = []
    for text in args.variant or ["base"]:
        name, _, own = text.partition(":")
        variants.append((name.strip(), [*shared, *own.split()]))
    threads = max(len(os.sched_getaffinity(0)) // args.jobs, 1)
    print(f"{machine()}, {args.jobs} at a time with {threads} thread(s) each")
    jobs = [(name, overrides, fold) for name, overrides in variants for fold in args.fold]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = list(pool.map(lambda job: run_variant(work, job[0], job[1], job[2], threads), jobs))
        if args.ensemble:
            models = {k: [pair[0] for job, pair in zip(jobs, folders, strict=True) if job[2] == k] for k in args.fold}
            folders += pool.map(lambda fold: average(work, variants, models[fold], fold, threads), args.fold)
            jobs += [(ENSEMBLE, [], fold) for fold in args.fold]
            variants.append((ENSEMBLE, []))
    for name, _ in variants if len(args.fold) > 1 else []:
        of_folds = {job[2]: pair for job, pair in zip(jobs, folders, strict=True) if job[0] == name}
        print(f"\n{table_of(name, of_folds)}")
    if len(variants) > 1:
        scored = {name: [f[1] for job, f in zip(jobs, folders, strict=True) if job[0] == name] for name, _ in variants}
        print(f"\n{compare_variants(scored, work)}")


if __name__ == "__main__":
    main()
