"""The demo set: scenes of waste, drawn."""
