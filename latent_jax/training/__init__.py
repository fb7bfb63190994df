"""A training run's parts: its state and step, the loop, what it keeps in its workdir and leaves behind it."""
