"""Models that answer: the facade, what is imagined before an answer, and decoding."""
