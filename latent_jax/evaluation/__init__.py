"""What an evaluation asks, keeps and compares."""
