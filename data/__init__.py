"""Photos, masks and folds: read, checked, cached and made, without torch."""
