"""Training methods, one file each: what the model sees (host) and what it is scored on (device)."""
