"""MLflow tracking that never stops or slows the work. Each output directory is its own journal.

A stage writes a tracking record into its output (`describe`). A separate process copies the record's contents to MLflow
(`send`; `followed` while a training runs). The next stage, or `distilldsm publish`, sends what a server did not accept.
Importing MLflow takes seconds, so this module does not; `publish` imports it when it is called.
"""

from __future__ import annotations

from distilldsm.tracking.addresses import default_uri, redact_uri, sqlite_path
from distilldsm.tracking.process import followed, send
from distilldsm.tracking.record import FILE, describe, identity_of, key_in_pipeline, run_id_of, run_key_of

__all__ = [
    "FILE",
    "default_uri",
    "describe",
    "followed",
    "identity_of",
    "key_in_pipeline",
    "redact_uri",
    "run_id_of",
    "run_key_of",
    "send",
    "sqlite_path",
]
