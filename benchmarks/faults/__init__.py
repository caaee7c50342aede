"""Fault injection: kills, full disks, lost servers and other faults while the pipeline runs. See `__main__`."""
