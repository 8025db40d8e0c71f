"""Generators of latents: the DiT, the two processes it can be trained for, and sampling.

A process is a module with two functions, `loss` and `sample`: `diffusion` (DDPM, the paper's) and `flow`. Both see a
generator only as `Predict` and noise only as `Draw` (`process`), so guidance, seeds and batches are `sampling`'s
business alone. Nothing here knows a tokenizer: a generator sees only z, normalised per channel by whoever made it.
"""
