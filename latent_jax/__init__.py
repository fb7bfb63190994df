"""Train vision-language models that reason in latent space."""
