"""Measurements behind the numbers in the README."""
