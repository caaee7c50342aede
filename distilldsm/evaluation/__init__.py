"""Scores of predictions: metrics, tables over cases and folds, comparison of trainings, post-processing, reports."""
