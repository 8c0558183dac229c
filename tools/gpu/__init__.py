"""Check on a GPU what no CPU can show, in one call that needs no network."""
