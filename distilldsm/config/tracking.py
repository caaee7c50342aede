"""Section `tracking` of `params.yaml`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow. MLFLOW_TRACKING_URI sets the server; without it, runs go to a SQLite file beside params.yaml."""

    enabled: bool = True
    """Record runs in MLflow."""
    experiment: str = "distilldsm"
    """MLflow experiment for all runs."""
    run_name: str | None = None
    """Name of the run. null: the model and the fold."""
