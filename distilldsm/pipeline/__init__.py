"""The stages put together: dvc.yaml, the Kubeflow pipeline, cross-validation, TrainJobs, sweeps and lineage."""
