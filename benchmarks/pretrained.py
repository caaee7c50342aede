"""Trains the hippocampus network that ships with the package, and writes its directory.

    python -m benchmarks.pretrained --data ../shared/data

Fold 0 of the preset `hippocampus` is trained, evaluated and exported below --work (default: build/pretrained; an
interrupted call resumes). `distilldsm/pretrained/hippocampus` then gets what prediction and fine-tuning need: the
OpenVINO IR, the weights, the plan, the distribution of the training data, the card and the metadata. The card's
scores are of the cases that were held out.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from benchmarks.pipeline import ROOT
from benchmarks.recipe import compose, data_folders, digest, run_variant, stage
from distilldsm.core.files import read_json, sha256_file, write_json
from distilldsm.models.catalogue import SHIPPED, Catalogue
from distilldsm.models.package import METADATA, verify

FILES = ("README.md", "model.bin", "model.safetensors", "model.xml", "plan.json", "training_distribution.json")
LARGEST_MB = 5.0


def ship(exported: Path, target: Path) -> None:
    """Copy the files of an exported model that ship. The metadata then name only these, and the card its input.

    Raises:
        SystemExit: a file is larger than LARGEST_MB.
    """
    verify(exported)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in FILES:
        size = shutil.copyfile(exported / name, target / name).stat().st_size
        if size > LARGEST_MB * 1e6:
            raise SystemExit(f"{name} has {size / 1e6:.1f} MB; a shipped file has at most {LARGEST_MB:g} MB")
    card, entry = target / "README.md", Catalogue.load().models[target.name]
    text = card.read_text().replace("MODEL_DIR", target.name)
    card.write_text(text.replace("## Input and output\n", f"## Input and output\n\nGive {entry.input}.\n"))
    metadata = read_json(exported / METADATA)
    metadata["files"] = {name: sha256_file(target / name) for name in FILES}
    write_json(target / METADATA, metadata)
    verify(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of Task04_Hippocampus.tar")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "pretrained")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    archive = (args.data / "Task04_Hippocampus.tar").resolve()
    overrides = ["dataset=hippocampus", f"download.source={archive}", "train.validate_every=200"]
    threads = len(os.sched_getaffinity(0))
    model, evaluation = run_variant(work, "hippocampus", overrides, 0, threads)
    own = ["export.int8.enabled=false", "export.register_model=false", "tracking.enabled=false"]
    path, params = compose(work, [*overrides, *own])
    _, _, prepared = data_folders(work, params)
    exported = work / f"export-{digest(model.name, params['export'])}"
    arguments = ["--params", str(path), "--fold", "0", "--model", str(model), "--preprocessed", str(prepared)]
    stage(work, "export", [*arguments, "--evaluation", str(evaluation), "--output", str(exported)], exported, threads)
    ship(exported, SHIPPED / "hippocampus")
    print(SHIPPED / "hippocampus")


if __name__ == "__main__":
    main()
