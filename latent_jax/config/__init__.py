"""What a run can be told: typed settings, the schema, and the sections of a training run and of an evaluation."""
