"""Section `tracking` of `params.yaml`."""

from __future__ import annotations

from dataclasses import dataclass

from distilldsm.core.mapping import NotNegative


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow. MLFLOW_TRACKING_URI sets the server; without it, runs go to a SQLite file beside params.yaml."""

    enabled: bool = True
    """Record runs in MLflow."""
    experiment: str = "distilldsm"
    """MLflow experiment for all runs."""
    run_name: str | None = None
    """Name of the run. null: the model and the fold."""
    wait_minutes: NotNegative = 10.0
    """Minutes that a step on Kubeflow waits at its end for a server that is away. (Its disk goes with its pod.)"""
