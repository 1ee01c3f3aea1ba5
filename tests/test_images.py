"""Images made ready: normalised channels, and crops and mirrors that depend on the sample alone."""

from types import SimpleNamespace

import numpy as np
import pytest

from mpiml.data import Rows, batches, crop_and_flip, normalize
from mpiml.random import bits, key

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(1, 256, (60, 3, 7, 5), "u1")  # without 0, the border's


def test_each_channel_is_normalized():
    mean, deviation = (10.0, 20.0, 30.0), (1.0, 2.0, 4.0)
    out = normalize(IMAGES, mean, deviation)
    assert out.dtype == np.float32
    for channel in range(3):
        np.testing.assert_allclose(out[:, channel], (IMAGES[:, channel] - mean[channel]) / deviation[channel], rtol=1e-6)
    np.testing.assert_array_equal(normalize(IMAGES[:, :1], 10, 2), normalize(IMAGES[:, :1], [10], [2]))
    assert normalize(IMAGES.astype(np.float64), mean, deviation).dtype == np.float32


def test_rows_of_a_file_are_images_too(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES)
    np.testing.assert_array_equal(normalize(Rows(tmp_path / "x.npy")[:9], 3, 2), normalize(IMAGES[:9], 3, 2))


@pytest.mark.parametrize("images, mean", [(IMAGES[:, :1], (1, 2, 3)), (IMAGES, (1, 2)), (IMAGES[0, 0], (1, 2, 3))], ids=str)
def test_as_many_numbers_as_channels(images, mean):
    with pytest.raises(ValueError, match=f"{len(mean)} numbers, one for each channel, do not suit images of shape"):
        normalize(images, mean, 1.0)


def windows(image, padding):
    """{all that can come of an image: how}."""
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    height, width = image.shape[1:]
    found = {}
    for down in range(2 * padding + 1):
        for right in range(2 * padding + 1):
            window = padded[:, down:down + height, right:right + width]
            found[window.tobytes()] = down, right, 0
            found[np.ascontiguousarray(window[..., ::-1]).tobytes()] = down, right, 1
    return found


@pytest.mark.parametrize("dtype", ["u1", "f4", "f8"])
@pytest.mark.parametrize("padding", [0, 2])
def test_crops_are_windows_of_the_padded_image(padding, dtype):
    images = IMAGES.astype(dtype)
    out = crop_and_flip(images, np.arange(60), epoch=1, padding=padding)
    assert out.dtype == images.dtype and out.shape == images.shape
    assert all(made.tobytes() in windows(image, padding) for image, made in zip(images, out, strict=True))


def test_every_window_is_as_likely():
    count = 9000
    image = RNG.integers(1, 256, (1, 1, 4, 4), "u1")
    names = windows(image[0], 1)
    out = crop_and_flip(np.repeat(image, count, axis=0), np.arange(count), epoch=0, padding=1)
    found = np.zeros((3, 3, 2), int)
    for made in out:
        found[names[made.tobytes()]] += 1
    assert found.min() > 400 and found.max() < 600  # 500 on average, with a deviation of 22


def test_a_sample_comes_out_alike_in_any_batch():
    whole = crop_and_flip(IMAGES, np.arange(60), epoch=3, seed=1)
    some = RNG.permutation(60)[:17]
    np.testing.assert_array_equal(crop_and_flip(IMAGES[some], some, epoch=3, seed=1), whole[some])
    np.testing.assert_array_equal(crop_and_flip(IMAGES[7:8], [7], epoch=3, seed=1), whole[7:8])
    strided = IMAGES.transpose(2, 3, 1, 0).copy().transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(crop_and_flip(strided, np.arange(60), epoch=3, seed=1), whole)
    assert crop_and_flip(IMAGES[:0], np.arange(0), epoch=0).shape == (0, 3, 7, 5)


def test_epochs_and_seeds_differ_and_the_images_stay_as_they_are():
    before = IMAGES.copy()
    outs = [crop_and_flip(IMAGES, np.arange(60), epoch, seed).tobytes() for epoch in range(3) for seed in range(3)]
    assert len(set(outs)) == 9
    np.testing.assert_array_equal(IMAGES, before)


def test_the_numbers_are_pinned():
    # A training that goes on must go on with the same images.
    image = np.arange(1, 10, dtype=np.uint8).reshape(1, 1, 3, 3)
    out = crop_and_flip(np.repeat(image, 3, axis=0), np.array([0, 1, 10**12]), epoch=5, seed=2, padding=1)
    assert out.reshape(3, 9).tolist() == [[3, 2, 1, 6, 5, 4, 9, 8, 7], [2, 3, 0, 5, 6, 0, 8, 9, 0], [0, 0, 0, 3, 2, 1, 6, 5, 4]]
    assert bits(0, np.array([1])).tolist() == [0xE220A8397B1DCDAF]  # the first number of SplitMix64 from 0, by its authors


def test_bits_are_random():
    z = bits(key(0, "test"), np.arange(4096))
    ones = np.unpackbits(z.view(np.uint8).reshape(4096, 8), axis=1)
    assert abs(ones.mean(axis=0) - 0.5).max() < 0.04
    assert np.abs(np.corrcoef(ones.T) - np.eye(64)).max() < 0.08


@pytest.mark.parametrize("images, samples", [(IMAGES, np.arange(59)), (IMAGES[0], np.arange(3)), (IMAGES, np.arange(60.0))],
                         ids=["59 samples", "one image", "floats"])
def test_what_cannot_be_cropped(images, samples):
    with pytest.raises(ValueError, match=r"crop_and_flip takes images \(n, c, h, w\) and the n numbers of these samples"):
        crop_and_flip(images, samples, epoch=0)


@pytest.mark.parametrize("ranks, size", [(1, 60), (2, 8), (3, 9)])
def test_augmented_batches_are_the_same_on_any_grid(ranks, size):
    whole = crop_and_flip(IMAGES, np.arange(60), epoch=4)
    for rank in range(ranks):
        grid = SimpleNamespace(replica=rank, data=ranks, lanes=None, pipe=1, undone=0, generation=0, same=lambda *_: None)
        for x, y in batches(IMAGES, np.arange(60), size, epoch=4, grid=grid, augment=crop_and_flip):
            np.testing.assert_array_equal(x, whole[y])
