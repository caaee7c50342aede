"""`distilldsm doctor`: what this machine has, what the services answer, and what to fix. Changes nothing.

`checks` runs, `report` prints; `machine`, `settings` and `services` hold the checks. Those of DVC, git and Kubeflow,
and the command, are in `distilldsm.cli.doctor`.
"""
