"""Training and prediction: the loop, its checkpoints, its ranks and its run folder."""
