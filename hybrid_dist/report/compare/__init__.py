"""Runs beside each other on the same pictures: differences with intervals, tests, gates, and where they disagree."""
