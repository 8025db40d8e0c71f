"""Numbers to trust: pixel metrics, distances between sets of images, and the protocols that stamp them.

Nothing here knows a model: everything takes images, as tensors, iterators or files.
"""
