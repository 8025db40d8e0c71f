"""One number per image -> a mean with its interval."""

import math

from torch import Tensor

from hieratok.core.estimates import Estimate


def summarize(key: str, values: Tensor) -> dict[str, float | list[float]]:
    """The mean over images of each column, and the 95% interval of that mean (Student's t).

    Args:
        key: the number's name, such as `slope`, or with a detail behind a slash, such as `noise_psnr/0.1`.
        values: (N,) or (N, k), a row for each image. Infinite values (the PSNR of identical images) are left out; a
            column that has none but these is infinite.

    Returns:
        `key`, `key_low` and `key_high` (`noise_psnr_low/0.1` with a detail): numbers, or lists of k. The interval of
        fewer than two images is NaN.
    """
    stem, slash, detail = key.partition("/")
    columns = values.double().reshape(len(values), -1).T
    rows = []
    for column in columns:
        found = Estimate.of(column.tolist())
        rows.append((found.mean, *(math.nan if end is None else end for end in (found.low, found.high))))
    keys = (key, f"{stem}_low{slash}{detail}", f"{stem}_high{slash}{detail}")
    lists = dict(zip(keys, map(list, zip(*rows))))
    return {name: column[0] for name, column in lists.items()} if values.ndim == 1 else dict(lists)
