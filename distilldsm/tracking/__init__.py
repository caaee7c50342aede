"""MLflow tracking that never stops or slows the work: the output directory is the journal.

A stage writes what it has to say into its output (`describe`), and a process of its own brings MLflow to that state
(`send`; `followed` while a training runs). What a server did not take is sent by the next stage, or by
`distilldsm publish`. Nothing here imports MLflow, which takes seconds; `publish` does, when it is called.
"""

from __future__ import annotations

from distilldsm.tracking.addresses import default_uri, redact_uri, sqlite_path
from distilldsm.tracking.process import followed, send
from distilldsm.tracking.record import FILE, describe, identity_of, run_id_of, run_key_of

__all__ = [
    "FILE",
    "default_uri",
    "describe",
    "followed",
    "identity_of",
    "redact_uri",
    "run_id_of",
    "run_key_of",
    "send",
    "sqlite_path",
]
