"""The latent space of any tokenizer in numbers: density, symmetries, frequencies, channels, robustness.

Functions take tensors and callables (`Codec`), so any autoencoder can be analysed; `hieratok.analyze` runs them all on
a trained tokenizer and images, and `hieratok.glossary.ANALYSIS` says in plain words what each number is.
"""
