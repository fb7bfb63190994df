"""The parts of an evaluation: who answers, the predictions that are kept, and paired comparisons."""
