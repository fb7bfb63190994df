"""TFDS builders: official on-disk forms to ArrayRecord files."""
