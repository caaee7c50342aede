"""The stages as a Kubeflow pipeline: definition, compilation, local runs, submission, cluster resources, lineage."""
