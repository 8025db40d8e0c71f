"""What training and evaluation see: augmentation, order, loaders, bad images; without state, so exactly resumable."""

import hashlib
import logging
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hieratok import data
from hieratok.data.images import (
    BadImageError,
    ImageDataset,
    StepBatches,
    center_crop,
    evaluation_batches,
    open_source,
    training_loader,
)


class Memory:
    """A source of given images; None: one that cannot be read."""

    def __init__(self, images: list[Tensor | None]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{index}.png"

    def label(self, index: int) -> int:
        return 100 + index

    def image(self, index: int) -> Tensor:
        image = self.images[index]
        if image is None:
            raise BadImageError(f"cannot read {index}.png: it is made up")
        return image


def noise(count: int, height: int = 40, width: int = 50) -> Memory:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    return Memory(list(images))


# --- the dataset


def test_augmentation_is_a_function_of_seed_epoch_and_index():
    items = {}
    for seed in (0, 1):
        for epoch in (0, 1, 2):
            for index in range(5):
                item = ImageDataset(noise(5), 16, seed=seed)[index, epoch]
                assert item["image"].shape == (3, 16, 16)
                assert item["image"].dtype == torch.uint8
                assert item["label"] == 100 + index
                assert item["skipped"] == 0
                items[seed, epoch, index] = item["image"]
    assert len({image.numpy().tobytes() for image in items.values()}) == len(items)

    dataset = ImageDataset(noise(5), 16, seed=1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for (seed, epoch, index), image in reversed(items.items()):
        if seed == 1:
            assert torch.equal(dataset[index, epoch]["image"], image)
    assert torch.equal(torch.get_rng_state(), before)


def test_center_crop_is_evaluations_and_half_are_mirrored():
    source = noise(1)
    crop = center_crop(source.image(0), 24)
    plain = ImageDataset(source, 24, "center", flip=False)
    assert all(torch.equal(plain[0, epoch]["image"], crop) for epoch in range(20))
    dataset = ImageDataset(source, 24, "center", flip=True, seed=5)
    mirrored = []
    for epoch in range(400):
        image = dataset[0, epoch]["image"]
        assert torch.equal(image, crop) != torch.equal(image, crop.flip(-1))
        mirrored.append(not torch.equal(image, crop))
    assert 150 < sum(mirrored) < 250  # five standard deviations


def test_crops_of_an_epoch_are_unlike_those_of_the_next():
    dataset = ImageDataset(noise(1), 16, flip=False)
    assert len({dataset[0, epoch]["image"].numpy().tobytes() for epoch in range(50)}) == 50


def test_min_area_bounds_the_crop():
    image = torch.arange(200).expand(3, 200, 200).to(torch.uint8)  # grey level = column
    for min_area, low, high in ((1.0, 190, 200), (0.04, 0, 120)):
        dataset = ImageDataset(Memory([image]), 64, flip=False, min_area=min_area)
        widths = [int(x.max()) - int(x.min()) for x in (dataset[0, e]["image"] for e in range(40))]
        assert low <= min(widths) <= high


def test_bad_image_is_an_error_that_names_it():
    images = noise(3).images
    images[1] = None
    with pytest.raises(BadImageError, match=r"^cannot read 1\.png: it is made up$"):
        ImageDataset(Memory(images), 16)[1, 0]


def test_skip_takes_the_next_readable_image_and_counts(caplog):
    images = noise(5).images
    images[3] = images[4] = None
    dataset = ImageDataset(Memory(images), 16, "center", flip=False, on_bad_image="skip")
    with caplog.at_level(logging.WARNING):
        item = dataset[3, 0]
        assert item["skipped"] == 2
        assert item["label"] == 100
        assert torch.equal(item["image"], center_crop(images[0], 16))
        dataset[4, 0]
    assert [r.getMessage() for r in caplog.records] == [
        f"skipped: cannot read {i}.png: it is made up" for i in (3, 4)
    ]  # each once
    assert dataset[2, 0]["skipped"] == 0


def test_skip_ends_where_nothing_can_be_read():
    dataset = ImageDataset(Memory([None] * 4), 16, on_bad_image="skip")
    with pytest.raises(BadImageError, match=r"none of the 4 images can be read, 2\.png among them"):
        dataset[2, 0]


def test_images_too_narrow_to_crop_are_bad_images():
    source = Memory([torch.zeros(3, 1, 20_000, dtype=torch.uint8), torch.ones(3, 20, 20, dtype=torch.uint8)])
    with pytest.raises(BadImageError, match=r"cannot crop 0\.png: .*20000 x 1 pixels is too narrow"):
        ImageDataset(source, 256, "center")[0, 0]
    assert ImageDataset(source, 256, "center", on_bad_image="skip")[0, 0]["skipped"] == 1
    with pytest.raises(BadImageError, match=r"cannot crop 0\.png"):
        list(evaluation_batches(source, 256, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size of images"),
        ({"crop": "centre"}, "crop must be random-resized or center, not 'centre'"),
        ({"on_bad_image": "ignore"}, "on_bad_image must be error or skip, not 'ignore'"),
        ({"min_area": 0.0}, "min_area"),
        ({"min_area": 1.5}, "min_area"),
        ({"seed": -1}, "seed"),
    ],
)
def test_dataset_refuses_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageDataset(noise(2), **{"size": 16, **settings})


# --- the order

ORDERS = st.fixed_dictionaries(
    {"num_images": st.integers(1, 40), "seed": st.integers(0, 2**40)}
)  # N smaller and larger than a batch


def flat(batches: StepBatches) -> list[tuple[int, int]]:
    return [item for batch in batches for item in batch]


@settings(deadline=None, max_examples=60)
@given(ORDERS, st.integers(1, 12), st.integers(1, 30))
def test_every_epoch_is_a_permutation(order, batch_size, num_steps):
    items = flat(
        StepBatches(**order, batch_size=batch_size, micro_batch_size=batch_size, start_step=0, num_steps=num_steps)
    )
    assert len(items) == batch_size * num_steps
    n = order["num_images"]
    for epoch in range(-(-len(items) // n)):
        part = items[epoch * n : (epoch + 1) * n]
        assert {e for _, e in part} == {epoch}
        images = [i for i, _ in part]
        assert len(set(images)) == len(images)
        assert set(images) <= set(range(n))


@settings(deadline=None, max_examples=60)
@given(ORDERS, st.integers(1, 4), st.integers(1, 4), st.integers(0, 20), st.integers(0, 20), st.integers(1, 3))
def test_resuming_at_any_step_gives_the_tail(order, micro, accumulation, start, rest, processes):
    for process in range(processes):
        common = {
            **order,
            "batch_size": micro * accumulation * processes,
            "micro_batch_size": micro,
            "process_index": process,
            "num_processes": processes,
        }
        whole = list(StepBatches(**common, start_step=0, num_steps=start + rest))
        tail = StepBatches(**common, start_step=start, num_steps=rest)
        assert list(tail) == whole[start * accumulation :]
        assert len(tail) == rest * accumulation
        assert list(tail) == list(tail)


@settings(deadline=None, max_examples=60)
@given(ORDERS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 9), st.integers(1, 9))
def test_processes_together_do_the_micro_batches_of_one_process(order, micro, accumulation, processes, start, steps):
    common = {
        **order,
        "batch_size": micro * accumulation * processes,
        "micro_batch_size": micro,
        "start_step": start,
        "num_steps": steps,
    }
    alone = list(StepBatches(**common))
    together = [list(StepBatches(**common, process_index=r, num_processes=processes)) for r in range(processes)]
    per_step = accumulation * processes
    for step in range(steps):
        joined = [b for batches in together for b in batches[step * accumulation : (step + 1) * accumulation]]
        assert joined == alone[step * per_step : (step + 1) * per_step]


@settings(deadline=None, max_examples=30)
@given(ORDERS, st.integers(1, 3), st.integers(1, 4))
def test_the_size_of_micro_batches_does_not_change_a_step(order, micro, accumulation):
    common = {**order, "batch_size": micro * accumulation, "start_step": 3, "num_steps": 5}
    whole = StepBatches(**common, micro_batch_size=micro * accumulation)
    assert flat(StepBatches(**common, micro_batch_size=micro)) == flat(whole)


def test_orders_differ_between_epochs_and_seeds():
    def order(seed):
        return flat(StepBatches(50, 50, 50, 0, 3, seed))

    first = [i for i, _ in order(0)]
    assert len({tuple(first[e * 50 : (e + 1) * 50]) for e in range(3)}) == 3
    assert order(0) == order(0)
    assert order(0) != order(1)


def test_places_are_uniform_over_epochs():
    """Each image comes first about equally often."""
    first = Counter(i for i, _ in flat(StepBatches(4, 4, 4, 0, 2000))[::4])
    assert all(400 < first[i] < 600 for i in range(4))  # 500, five standard deviations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_images": 0}, "at least 1"),
        ({"micro_batch_size": 0}, "at least 1"),
        ({"start_step": -1}, "must not be negative"),
        ({"num_steps": -1}, "must not be negative"),
        ({"seed": -1}, "must not be negative"),
        ({"process_index": 2, "num_processes": 2}, "no process 2 among 2"),
        ({"batch_size": 9}, "a batch of 9 does not divide into 1 processes times micro-batches of 4"),
        ({"num_processes": 3}, "a batch of 8 does not divide into 3 processes times micro-batches of 4"),
    ],
)
def test_order_refuses_bad_numbers(change, message):
    good = {"num_images": 5, "batch_size": 8, "micro_batch_size": 4, "start_step": 0, "num_steps": 1}
    with pytest.raises(ValueError, match=message):
        StepBatches(**{**good, **change})


# --- loaders


def batches(num_images: int, start: int = 0, steps: int = 6, **kwargs) -> StepBatches:
    return StepBatches(num_images, 8, 4, start, steps, seed=3, **kwargs)


def digest(loader) -> list[str]:
    return [hashlib.sha256(b["image"].numpy().tobytes() + b["label"].numpy().tobytes()).hexdigest() for b in loader]


def test_loader_gives_the_same_pixels_for_any_number_of_workers_and_processes():
    dataset = ImageDataset(noise(11), 16, seed=2)
    expected = digest(training_loader(dataset, batches(11), 0))
    assert len(set(expected)) == 12
    for workers in (1, 3):
        loader = training_loader(dataset, batches(11), workers)
        assert digest(loader) == expected
        assert digest(training_loader(dataset, batches(11, start=4, steps=2), workers)) == expected[8:]
    by_process = [digest(training_loader(dataset, batches(11, process_index=r, num_processes=2), r)) for r in range(2)]
    assert [x for pair in zip(*by_process) for x in pair] == expected


def test_loader_leaves_the_random_state_of_the_run_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for workers in (0, 1):
        batch = next(iter(training_loader(ImageDataset(noise(11), 16), batches(11), workers)))
        assert torch.equal(torch.get_rng_state(), before)
    assert batch["image"].shape == (4, 3, 16, 16)
    assert batch["image"].dtype == torch.uint8
    assert batch["label"].dtype == batch["skipped"].dtype == torch.int64
    assert batch["skipped"].shape == (4,)


class ThreadCount(Memory):
    def label(self, index: int) -> int:
        return torch.get_num_threads()


def test_workers_have_one_thread_each():
    loader = training_loader(ImageDataset(ThreadCount(noise(4).images), 16), batches(4), 1)
    assert next(iter(loader))["label"].tolist() == [1] * 4


def test_a_workers_error_is_one_line():
    images = noise(8).images
    images[5] = None
    for workers in (0, 2):
        with pytest.raises(BadImageError) as caught:
            list(training_loader(ImageDataset(Memory(images), 16), batches(8), workers))
        assert str(caught.value) == "cannot read 5.png: it is made up"


def test_skipped_images_are_counted_once_a_place():
    images = noise(8).images
    images[5] = None
    dataset = ImageDataset(Memory(images), 16, on_bad_image="skip")
    for workers in (0, 2):
        skipped = [int(b["skipped"].sum()) for b in training_loader(dataset, batches(8), workers)]
        assert sum(skipped) == 6  # six epochs


# --- from files to batches


def test_folder_with_bad_files_from_end_to_end(tmp_path, caplog):
    for i in range(6):
        (tmp_path / f"class{i % 2}").mkdir(exist_ok=True)
        Image.effect_noise((60, 40), 50).convert("RGB").save(tmp_path / f"class{i % 2}" / f"{i}.jpg", quality=95)
    half = tmp_path / "class0" / "0.jpg"
    half.write_bytes(half.read_bytes()[:-500])
    (tmp_path / "class1" / "9.png").write_text("no image")
    source = open_source(str(tmp_path))
    with pytest.raises(BadImageError, match=r"cannot read .*class0/0\.jpg"):
        digest(training_loader(ImageDataset(source, 32), batches(len(source)), 0))
    dataset = ImageDataset(source, 32, on_bad_image="skip")
    found = list(training_loader(dataset, StepBatches(len(source), 7, 7, 0, 1), 0))
    assert found[0]["skipped"].sum() == 3  # the first once, the last and then the first again
    assert sorted(found[0]["label"].tolist()) == [0, 0, 0, 0, 1, 1, 1]
    with pytest.raises(BadImageError, match=r"cannot read .*class0/0\.jpg"):
        list(evaluation_batches(source, 32, 4))


def test_evaluation_sees_every_image_once_whatever_the_batches_and_processes():
    source = noise(23)
    expected = {source.name(i): (source.label(i), center_crop(source.image(i), 16)) for i in range(23)}
    for batch_size, processes in ((1, 1), (5, 1), (64, 1), (4, 2), (5, 3), (1, 30)):
        seen = {}
        for process in range(processes):
            for names, labels, images in evaluation_batches(source, 16, batch_size, process, processes):
                assert len(names) == len(labels) == len(images) <= batch_size
                assert labels.dtype == torch.int64
                assert images.dtype == torch.uint8
                for name, label, image in zip(names, labels.tolist(), images):
                    assert name not in seen
                    seen[name] = (label, image)
        assert seen.keys() == expected.keys()
        for name, (label, image) in expected.items():
            assert seen[name][0] == label
            assert torch.equal(seen[name][1], image)


def test_evaluation_keeps_the_sources_order_and_can_be_left_early():
    source = noise(9)
    names = [name for batch, _, _ in evaluation_batches(source, 16, 4) for name in batch]
    assert names == [source.name(i) for i in range(9)]
    iterator = evaluation_batches(source, 16, 2)
    next(iterator)
    iterator.close()


def test_evaluation_refuses_bad_numbers_at_once():
    for arguments in ((1, 4), (16, 0), (16, 4, 2, 2), (16, 4, -1, 2)):
        with pytest.raises(ValueError, match="size must be at least 2"):
            evaluation_batches(noise(2), *arguments)


def test_real_shards_from_end_to_end(shared):
    source = open_source(f"{shared}/data/imagenette128/val-*.tar")
    labels = Counter()
    total = torch.zeros(3, dtype=torch.float64)
    for _, batch_labels, images in evaluation_batches(source, 128, 256):
        labels.update(batch_labels.tolist())
        total += images.double().mean(dim=(2, 3)).sum(0)
    assert sum(labels.values()) == 3425
    assert len(labels) == 10
    mean = total / 3425
    np.testing.assert_allclose(mean / 255, [0.46, 0.45, 0.42], atol=0.03)  # of ImageNet's kind: RGB, not BGR
    first, second = (
        digest(training_loader(ImageDataset(source, 64), StepBatches(3425, 64, 32, 1000, 2), w)) for w in (0, 2)
    )
    assert first == second


def test_data_imports_nothing_of_ours_but_the_readers():
    for file in Path(data.__file__).parent.glob("*.py"):
        for line in file.read_text().splitlines():
            if "import hieratok" in line or "from hieratok" in line:
                assert re.search(r"hieratok\.(core|data|errors|files)\b", line), f"{file.name}: {line}"
