"""Ensembles of predictions: members, weights, temperatures and recipes, without torch."""
