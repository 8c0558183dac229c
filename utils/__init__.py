"""Helpers that know nothing of an experiment."""
