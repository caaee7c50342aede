"""Whether new scans look like those a model was trained on; needs neither torch nor a network."""
