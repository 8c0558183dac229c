"""Extra commands, each run as python -m tools.<name>; nothing imports them."""
