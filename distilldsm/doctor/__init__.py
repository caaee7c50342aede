"""`distilldsm doctor`: checks this machine and the services, and says what to fix. It changes nothing.

`checks` runs the checks, `report` prints their findings. `machine`, `settings` and `services` hold the checks; those of
DVC, git and Kubeflow are in `distilldsm.cli.doctor`, beside the command.
"""
