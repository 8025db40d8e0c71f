"""The latent space of any tokenizer in numbers: density, symmetries, frequencies, channels, robustness.

Functions take tensors and callables (`Codec`), so any autoencoder can be analysed; `hieratok.tasks.analyze` runs them
all on a trained tokenizer and images, and `hieratok.core.glossary.ANALYSIS` says what each number is.
"""
