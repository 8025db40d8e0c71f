"""Metrics of any tokenizer's latent space: density, symmetries, frequencies, channels, robustness.

Functions take tensors and callables (`Codec`), so any autoencoder can be analysed; `hieratok.tasks.analyze` runs all of
them on a trained tokenizer and images. `hieratok.core.glossary.ANALYSIS` explains each number.
"""
