"""Images made ready for a model: normalised, and cropped and flipped at random in training."""

import numpy as np

from mpiml.random import bits, key


def normalize(images, mean, deviation):
    """Images as float32 with each channel's ``mean`` taken out, divided by its ``deviation``.

    Parameters
    ----------
    images : array (n, c, h, w)
        Of uint8, say.
    mean, deviation : float, or c floats
        In the units of the images.

    Raises
    ------
    ValueError
        Their number is not that of the channels.

    Examples
    --------
    >>> normalize(np.full((1, 2, 1, 1), 9, np.uint8), mean=(3, 6), deviation=(2, 1)).ravel()
    array([3., 3.], dtype=float32)
    """
    mean, factor = np.asarray(mean, float), 1 / np.asarray(deviation, float)
    for values in mean, factor:
        if values.ndim and images.shape[-3:-2] != values.shape:
            raise ValueError(f"{len(values)} numbers, one for each channel, do not suit images of shape {images.shape}")
    mean, factor = (values.astype(np.float32).reshape((-1, 1, 1) if values.ndim else ()) for values in (mean, factor))
    return (np.asarray(images, np.float32) - mean) * factor


def crop_and_flip(images, samples, epoch, seed=0, padding=4):
    """Each image moved at random by up to ``padding`` pixels, and every second one mirrored: other ones in each epoch.

    This is the usual augmentation of small photographs (Lee et al. 2015, "Deeply-supervised nets"): a border of 0 is put
    around the image, and a window of its old size is cut out anywhere in that. Which window, and whether left and right
    change places, is a function of (seed, epoch, number of the sample): the same in any batch, on any rank. So it suits
    ``augment`` of :class:`mpiml.data.batches`.

    Parameters
    ----------
    images : array (n, c, h, w)
        uint8 or floats. Normalise them afterwards, so that the border is black.
    samples : (n,) array of integers
        The numbers of the images in their data set.
    epoch, seed : int
    padding : int

    Returns
    -------
    array (n, c, h, w)
        A new one, of the same dtype.

    Raises
    ------
    ValueError
        The arrays have other shapes, or the numbers are no integers.

    Examples
    --------
    >>> image = np.arange(1, 10, dtype=np.uint8).reshape(1, 1, 3, 3)
    >>> crop_and_flip(image, np.array([2]), epoch=0, padding=1)[0, 0]
    array([[2, 3, 0],
           [5, 6, 0],
           [8, 9, 0]], dtype=uint8)
    """
    samples = np.asarray(samples)
    if images.ndim != 4 or samples.shape != images.shape[:1] or samples.dtype.kind not in "iu":
        raise ValueError(f"crop_and_flip takes images (n, c, h, w) and the n numbers of these samples, not arrays of shape "
                         f"{images.shape} and {samples.shape} of {samples.dtype}")
    n, c, h, w = images.shape
    padded = np.zeros((n, c, h + 2 * padding, w + 2 * padding), images.dtype)
    padded[:, :, padding:padding + h, padding:padding + w] = images
    random = bits(key(seed, "crop and flip", epoch), samples)
    places = np.uint64(2 * padding + 1)
    downs, rights, flips = random % places, random // places % places, random >> np.uint64(63)
    cropped = np.empty(images.shape, images.dtype)
    # Faster than one gather of all pixels.
    for i, (down, right, flip) in enumerate(zip(downs.tolist(), rights.tolist(), flips.tolist(), strict=True)):
        window = padded[i, :, down:down + h, right:right + w]
        cropped[i] = window[..., ::-1] if flip else window
    return cropped
