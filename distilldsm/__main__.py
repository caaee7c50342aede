"""`python -m distilldsm`: the same as the command `distilldsm`."""

from __future__ import annotations

from distilldsm.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
