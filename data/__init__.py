"""Read, check, cache, split, augment and import photos and masks, without torch."""
