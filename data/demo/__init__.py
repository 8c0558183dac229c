"""Draw the demo set: photo-like scenes of trash."""
