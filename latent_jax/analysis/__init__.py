"""What the latents hold, and whether they matter."""
