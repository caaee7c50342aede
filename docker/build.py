"""Build the container images of the given roles: `python docker/build.py ROLE...`. See --help."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROLES = ("data", "train", "export", "mlflow")


def version() -> str:
    """The package's version, read without importing the package."""
    text = (ROOT / "distilldsm/core/version.py").read_text(encoding="utf-8")
    match = re.search(r'__version__ = "([^"]+)"', text)
    if match is None:
        raise SystemExit("error: distilldsm/core/version.py contains no version")
    return match[1]


def git_commit() -> str:
    """The commit of the working tree, with `-dirty` if files have changed; `unknown` outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def wheels_image(engine: str, wheelhouse: Path, tag: str, environment: dict[str, str]) -> str:
    """Build an image with a folder of wheels, for mounting. Not every engine supports a second build context."""
    if not any(wheelhouse.glob("*.whl")):
        raise SystemExit(
            f"error: {wheelhouse}: contains no wheel\n  hint: pip wheel -w {wheelhouse} -c constraints.txt ..."
        )
    text = "FROM scratch\nCOPY *.whl /\n"
    command = [engine, "build", "--tag", tag, "--file", "-", str(wheelhouse)]
    subprocess.run(command, input=text, text=True, check=True, env=environment)
    return tag


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("roles", nargs="*", metavar="ROLE", help=f"any of {', '.join(ROLES)}; default: all")
    parser.add_argument("--engine", default="docker", help="docker, podman or buildah (default: %(default)s)")
    parser.add_argument("--prefix", default="distilldsm", help="tags are PREFIX/ROLE:VERSION (default: %(default)s)")
    parser.add_argument("--base-image", help="image with python3 >= 3.11 and venv (default: see docker/Dockerfile)")
    parser.add_argument(
        "--torch-build", default="", help="local version of torch, e.g. +cpu; default: the index chooses"
    )
    parser.add_argument("--wheelhouse", type=Path, help="folder of wheels to install from, without any index")
    parser.add_argument("--pip-config", type=Path, help="pip's configuration file, passed to the build as a secret")
    parser.add_argument("--ca-bundle", type=Path, help="CA certificates for pip, passed to the build as a secret")
    parser.add_argument("--network", help="network of the build: host or none (default: the engine's)")
    parser.add_argument("--source", default="", help="address of the source code for the image's label")
    args = parser.parse_args(argv)
    if unknown := set(args.roles) - set(ROLES):
        parser.error(f"unknown role {', '.join(sorted(unknown))}")

    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
    options = ["--build-arg", f"VERSION={version()}", "--build-arg", f"GIT_COMMIT={git_commit()}"]
    options += ["--build-arg", f"TORCH_BUILD={args.torch_build}", "--build-arg", f"SOURCE={args.source}"]
    if args.base_image:
        options += ["--build-arg", f"BASE_IMAGE={args.base_image}"]
    if args.wheelhouse:
        tag = wheels_image(args.engine, args.wheelhouse, f"{args.prefix}/wheels:{version()}", environment)
        options += ["--build-arg", f"WHEELS={tag}"]
    if args.network:
        options += ["--network", args.network]
    for name, path in (("pip_config", args.pip_config), ("ca_bundle", args.ca_bundle)):
        if path:
            options += ["--secret", f"id={name},src={path}"]
    for role in args.roles or ROLES:
        tag = f"{args.prefix}/{role}:{version()}"
        file = str(ROOT / "docker/Dockerfile")
        command = [args.engine, "build", *options, "--target", role, "--tag", tag, "--file", file, str(ROOT)]
        if subprocess.run(command, env=environment, check=False).returncode:
            raise SystemExit(f"error: the image {tag} could not be built")
        print(tag)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
