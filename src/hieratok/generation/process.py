"""The types that a process uses: a generator as `Predict`, and noise as `Draw`."""

from collections.abc import Callable

from torch import Tensor

# (latents (B, d, h, w), times (B,), class labels (B,)) -> what the process predicts, (B, d, h, w), or (B, 2 d, h, w)
# where the second half sets the variance. A DiT, a guided one, or any function in a test.
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]

# () -> the next standard normals for the batch being sampled, (B, d, h, w)
Draw = Callable[[], Tensor]
