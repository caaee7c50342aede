"""The command line shell that every stage shares."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from distilldsm.errors import UserError


def stage_main(run: Callable[[], None]) -> int:
    """Run a stage; print what the user must mend to stderr and return the exit code (0 only for success)."""
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on where it stopped", file=sys.stderr)
        return 130
    except OSError as error:
        if os.environ.get("DISTILLDSM_DEBUG"):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    return 0
