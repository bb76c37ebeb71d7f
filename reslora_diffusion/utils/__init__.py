"""Helpers that belong to no floor: the standard library alone."""
