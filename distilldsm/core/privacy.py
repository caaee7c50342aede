"""Keeps libraries from reporting their use to their makers. They do so by default, some of them at import."""

from __future__ import annotations

import os
import sys

SWITCHES = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime since 1.32, in native code
    "GX_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "ITERATIVE_DO_NOT_TRACK": "1",  # DVC's remotes and extensions
    "DO_NOT_TRACK": "1",
}
"""Environment variables; child processes inherit them."""
REPORTERS = ("openvino_telemetry",)
"""OpenVINO and NNCF report through this package, which obeys no variable but `CI`. Both work where it is missing."""


def switch_off_telemetry() -> None:
    """Set the switches that the user has not set, and let the imports of `REPORTERS` fail."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    for name in REPORTERS:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # so Python marks what cannot be imported
