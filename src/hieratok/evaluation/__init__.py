"""Evaluation: pixel metrics, distances between sets of images, and the protocols that use them.

Nothing here depends on a model: inputs are images, as tensors, iterators or files.
"""
