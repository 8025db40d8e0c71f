"""Generators of latents: the DiT, the two processes it can be trained for, and sampling.

A process is a module with two functions, `loss` and `sample`: `diffusion` (DDPM, the paper's) and `flow`. Both use a
generator only as `Predict` and noise only as `Draw` (`process`); guidance, seeds and batches are in `sampling`. Nothing
here depends on a tokenizer: a generator sees only z, already normalised per channel.
"""
