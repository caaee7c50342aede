"""Section `tracking` of `params.yaml`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow. The address comes from MLFLOW_TRACKING_URI, else a SQLite file beside params.yaml."""

    enabled: bool = True
    """Record runs in MLflow."""
    experiment: str = "distilldsm"
    """MLflow experiment of all runs."""
    run_name: str | None = None
    """Name of the run. null: the model and the fold."""
