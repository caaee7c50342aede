"""What `predict` imports needs nothing that only some systems have."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import importlib, os, pkgutil, sys
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
if hasattr(os, "sched_getaffinity"):
    del os.sched_getaffinity
imported = ["distilldsm.cli.main", "distilldsm.cli.predict", "distilldsm.cli.params", "distilldsm.cli.compose"]
for room in ("core", "config", "io", "data", "inference"):
    package = importlib.import_module(f"distilldsm.{room}")
    imported += [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
for name in imported:
    if name != "distilldsm.inference.monai":  # needs torch; for MONAI's own command
        importlib.import_module(name)
print(len(imported))
from distilldsm.cli.main import main
sys.exit(main(["predict", "--help"]))
"""


def test_predict_imports_nothing_that_only_unix_has():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 40
    assert "usage: distilldsm predict" in done.stdout
