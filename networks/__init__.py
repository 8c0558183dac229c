"""The parts of a model, as modules that take plain numbers, and their published weights."""
