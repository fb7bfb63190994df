"""The config of a run: typed options, the schema, and the sections of a training run and of an evaluation."""
