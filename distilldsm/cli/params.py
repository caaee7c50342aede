"""`distilldsm params`: show every parameter with type, default and meaning."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("keys", metavar="KEY", nargs="*", help="a parameter or a section, e.g. train.augment")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON schema of params.yaml (conf/params.schema.json)"
    )


def run(args: argparse.Namespace) -> None:
    """Print the reference of the parameters."""
    import json

    from distilldsm.config.reference import as_markdown, as_text, json_schema, matching

    if args.schema:
        print(json.dumps(json_schema(), indent=1))
        return
    parameters = matching(args.keys)
    print(as_markdown(parameters) if args.markdown else as_text(parameters))
