"""`distilldsm models`: list the trained models, and fetch one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from distilldsm.core.errors import ConfigError

EPILOG = "A model's name stands for its directory: distilldsm predict NAME scan.nii.gz -o mask.nii.gz"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("action", nargs="?", choices=("list", "pull"), default="list", help="default: %(default)s")
    parser.add_argument("model", metavar="NAME|URL", nargs="?", help="pull: a name, or the address of an archive")
    parser.add_argument("--sha256", metavar="HEX", help="pull: expected SHA-256 of an archive given by its address")
    parser.add_argument("--catalogue", metavar="FILE", type=Path, help="another catalogue than the package's")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> None:
    """List or fetch models."""
    from distilldsm.models import catalogue

    file = args.catalogue or catalogue.CATALOGUE
    if args.action == "pull":
        if not args.model:
            raise ConfigError(
                "needs a name or an address", where="models pull", hint="distilldsm models lists the names"
            )
        place = catalogue.pull(args.model, sha256=args.sha256, catalogue=file)
        entry = catalogue.Catalogue.load(file).models.get(args.model)
        print(place if entry is None else f"{place}: {entry.title}. Licence: {entry.licence}. Input: {entry.input}")
        return
    known, here = catalogue.Catalogue.load(file).models, catalogue.installed()
    if args.json:
        from distilldsm.core.mapping import to_mapping

        places = {name: str(path) for name, path in here.items()}
        print(json.dumps({"catalogue": to_mapping(known), "installed": places}, indent=2))
        return
    for name in sorted({*known, *here}):
        entry = known.get(name)
        state = str(here[name]) if name in here else f"not here: distilldsm models pull {name}"
        print(f"{name:20}{f'{entry.title}; {entry.licence}; ' if entry else ''}{state}")
    if not (known or here):
        print("no models: the catalogue is empty, and none is installed")
