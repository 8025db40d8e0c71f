"""Tasks with trained models, for commands and studies: reconstruct, write latents, sample, analyze."""
