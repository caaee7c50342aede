"""`distilldsm lineage`: from a DVC, MLflow or Kubeflow id to the other ids."""

from __future__ import annotations

import argparse
import json

DESCRIPTION = "Show everything that belongs to a run in DVC, MLflow and Kubeflow."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("identifier", help="MLflow run, KFP run, SHA-256 of dvc.lock, git commit, or MODEL/VERSION")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> None:
    """Ask the services and print what they know."""
    from distilldsm.pipeline.lineage import format_lineage, lineage
    from distilldsm.tracking import default_uri
    from distilldsm.tracking.store import explained

    with explained(default_uri(), "searching the runs"):
        found = lineage(args.identifier)
    print(json.dumps(found, indent=2) if args.json else format_lineage(found))
