"""Losses: pure functions of arrays that return (sum, weight, metrics) and import nothing of ours."""
