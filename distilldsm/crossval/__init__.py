"""Cross-validation: the folds of one recipe in one table."""
