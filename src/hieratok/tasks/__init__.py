"""What people do with trained models: reconstruct, write latents, sample, analyze. Commands and studies call these."""
