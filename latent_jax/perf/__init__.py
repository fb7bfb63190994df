"""What measures speed and fit: the sides of `bench` (modules with `measure(options) -> Report`), parity, and `plan`."""
