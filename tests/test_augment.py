import colorsys
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled
from PIL import Image
from scipy import ndimage

from sul_jax import augment

KEY = jax.random.key(0)
ALL: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "noise": partial(augment.gaussian_noise, scale=0.1),
    "flip": augment.horizontal_flip,
    "crop": augment.random_resized_crop,
    "jitter": partial(augment.color_jitter, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    "grayscale": partial(augment.grayscale, probability=0.5),
    "blur": partial(augment.gaussian_blur, kernel_size=5),
    "perspective": partial(augment.random_perspective, distortion=0.5),
}


CROP = compiled(augment.random_resized_crop)
FLIP = compiled(augment.horizontal_flip)
JITTER = compiled(augment.color_jitter)


def images(channels: int = 3) -> np.ndarray:
    return np.random.default_rng(1).random((16, 12, 10, channels), np.float32)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ALL)
def test_shapes_keys_and_jit(name: str, channels: int) -> None:
    x = jnp.asarray(images(channels))
    changed = np.asarray(ALL[name](KEY, x))
    assert changed.shape == x.shape
    assert np.all(np.isfinite(changed))
    inside = jax.jit(ALL[name])
    np.testing.assert_allclose(inside(KEY, x), changed, atol=1e-5)
    if (name, channels) != ("grayscale", 1):
        assert not np.allclose(inside(jax.random.key(9), x), changed)
    if name != "noise":
        assert changed.min() >= -1e-5
        assert changed.max() <= 1 + 1e-5


def test_blur_is_scipys() -> None:
    x = images(1)
    got = compiled(augment.gaussian_blur)(KEY, x, kernel_size=9, sigma=(1.5, 1.5))
    expected = ndimage.gaussian_filter(x, (0, 1.5, 1.5, 0), mode="mirror", radius=4)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert compiled(augment.random_view)(KEY, images(), blur=3).shape == images().shape
    with pytest.raises(ValueError, match="kernel_size=4 is not accepted: it must be odd"):
        augment.gaussian_blur(KEY, x, kernel_size=4)
    with pytest.raises(ValueError, match=r"sigma=\(0, 1\)"):
        augment.gaussian_blur(KEY, x, sigma=(0, 1))


def test_flip() -> None:
    x = images()
    np.testing.assert_array_equal(FLIP(KEY, x, probability=1.0), x[:, :, ::-1])
    np.testing.assert_array_equal(FLIP(KEY, x, probability=0.0), x)
    flipped = np.all(np.asarray(FLIP(KEY, x)) != x, axis=(1, 2, 3))
    assert 0 < flipped.sum() < 16


def test_crops_are_those_of_torchvision() -> None:
    """Areas of boxes that are drawn again until they fit: by rejection in NumPy."""
    ramps = np.stack(np.meshgrid(*[np.linspace(0, 1, 32, dtype=np.float32)] * 2, indexing="ij"), axis=-1)
    crops = np.asarray(CROP(KEY, np.broadcast_to(ramps, (4000, 32, 32, 2))))
    # From the slopes of the two ramps: height and width of each box, as shares of the image's.
    tall = (crops[:, 24, 16, 0] - crops[:, 8, 16, 0]) * 31 / 16
    wide = (crops[:, 16, 24, 1] - crops[:, 16, 8, 1]) * 31 / 16
    rng = np.random.default_rng(0)
    area = rng.uniform(0.08, 1, 100_000)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 100_000))
    fits = (area / aspect <= 1) & (area * aspect <= 1)
    for found, expected in ((tall, np.sqrt(area / aspect)), (wide, np.sqrt(area * aspect))):
        quantiles = np.linspace(0.05, 0.95, 10)
        np.testing.assert_allclose(
            np.quantile(found, quantiles), np.quantile(expected[fits], quantiles), atol=0.03
        )
    np.testing.assert_allclose((tall * wide).mean(), area[fits].mean(), atol=0.02)
    # Where no box fits, the largest in the middle.
    strip = np.broadcast_to(np.linspace(0, 1, 40, dtype=np.float32)[:, None], (2, 4, 40, 1))
    middle = CROP(KEY, strip, size=(4, 5), scale=(1.0, 1.0))
    np.testing.assert_allclose(np.asarray(middle)[:, :, 2], 0.5, atol=0.02)


def test_a_whole_crop_is_the_image_and_resizing_is_pillows() -> None:
    x = images(1)[:, :10]
    whole = partial(CROP, KEY, x, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    np.testing.assert_allclose(whole(), x, atol=1e-5)
    for size in ((5, 5), (4, 7), (23, 17)):
        got = whole(size=size)
        for one, image in zip(np.asarray(got), x, strict=True):
            expected = Image.fromarray(image[..., 0]).resize(size[::-1], Image.Resampling.BILINEAR)
            np.testing.assert_allclose(one[..., 0], expected, atol=1e-4)


def test_jitter_without_strength_changes_nothing() -> None:
    x = images()
    np.testing.assert_array_equal(JITTER(KEY, x), x)
    np.testing.assert_array_equal(JITTER(KEY, x, brightness=0.5, probability=0.0), x)


def test_brightness_is_one_factor_an_image() -> None:
    x = images() / 2 + np.float32(0.01)
    ratio = np.asarray(JITTER(KEY, x, brightness=0.9)) / x
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1, :1], x.shape), rtol=1e-3)
    assert np.std(ratio[:, 0, 0, 0]) > 0.1


@pytest.mark.parametrize("strength", ["contrast", "saturation"])
def test_contrast_and_saturation_are_one_factor_an_image(strength: str) -> None:
    """Of what differs from the image's mean luma, or from each pixel's own."""
    x = images() / 4 + np.float32(0.375)
    luma = (x @ np.float32([0.299, 0.587, 0.114]))[..., None]
    centre = luma.mean(axis=(1, 2, 3), keepdims=True) if strength == "contrast" else luma
    changed = np.asarray(JITTER(KEY, x, **{strength: 0.9}))
    factors = np.vecdot((changed - centre).reshape(16, -1), (x - centre).reshape(16, -1))
    factors = (factors / np.sum((x - centre) ** 2, axis=(1, 2, 3)))[:, None, None, None]
    np.testing.assert_allclose(changed, centre + factors * (x - centre), atol=1e-5)
    assert factors.min() >= 0.1
    assert factors.max() <= 1.9
    assert np.std(factors) > 0.1


@pytest.mark.parametrize("turn", [0.0, 0.1, -0.3, 0.5])
def test_hue_is_that_of_the_standard_library(turn: float) -> None:
    x = np.concatenate([images()[:2], np.zeros((1, 12, 10, 3)), np.ones((1, 12, 10, 3))], dtype=np.float32)
    got = np.asarray(jax.jit(augment._turn_hue)(x, np.full((4, 1, 1), turn, np.float32)))
    for pixel, after in zip(x.reshape(-1, 3), got.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel.tolist())
        expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        np.testing.assert_allclose(after, expected, atol=1e-4)


def test_grayscale_is_pillows() -> None:
    pixels = (images()[0] * 255).astype(np.uint8)
    gray = np.asarray(jax.jit(augment.grayscale)(KEY, pixels[None] / np.float32(255)))[0]
    expected = np.asarray(Image.fromarray(pixels).convert("L"))[..., None] / 255
    np.testing.assert_allclose(gray, np.broadcast_to(expected, gray.shape), atol=0.01)


def test_perspective() -> None:
    x = images()
    same = compiled(augment.random_perspective)(KEY, x, distortion=0.0, probability=1.0)
    np.testing.assert_allclose(same, x, atol=1e-4)
    # The four corners of the square go where the map says.
    sources = np.array([[0, 0], [0, 9], [11, 0], [11, 9]], np.float32)
    targets = sources + np.random.default_rng(0).random((4, 2), np.float32)
    matrix = np.asarray(jax.jit(augment._homography)(sources, targets))
    mapped = np.concatenate([sources, np.ones((4, 1))], 1) @ matrix.T
    np.testing.assert_allclose(mapped[:, :2] / mapped[:, 2:], targets, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: augment.random_resized_crop(KEY, x, scale=(0.9, 0.1)), "scale=.* is not accepted"),
        (lambda x: augment.color_jitter(KEY, x, hue=0.7), "hue=0.7 is not accepted"),
        (lambda x: augment.color_jitter(KEY, x, contrast=-1.0), "contrast=-1.0 is not accepted"),
        (lambda x: augment.gaussian_blur(KEY, x, kernel_size=21), "kernel_size=21 .* between 1 and 19"),
        (lambda x: augment.grayscale(KEY, x[..., :2]), "images has 2 channels"),
        (lambda x: augment.random_perspective(KEY, x, distortion=2.0), "distortion=2.0 is not accepted"),
        (lambda x: augment.horizontal_flip(KEY, x[0]), "images must have shape"),
        (lambda x: augment.gaussian_blur(KEY, x[0]), "images must have shape"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(images())


def test_perspective_needs_two_pixels() -> None:
    with pytest.raises(ValueError, match="at least 2 pixels"):
        augment.random_perspective(KEY, jnp.ones((1, 1, 4, 1)), distortion=0.3)


@pytest.mark.parametrize("strength", ["brightness", "contrast", "saturation"])
def test_jitter_stays_between_black_and_white(strength: str) -> None:
    changed = np.asarray(JITTER(KEY, np.round(images()), **{strength: 0.9}))
    assert (changed.min(), changed.max()) == (0, 1)
