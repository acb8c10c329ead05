"""Denoising with HDiT: Karras' preconditioning (arXiv 2206.00364), its loss, guidance, and a deterministic sampler.

A denoiser is a function `(noisy images, sigma [B]) -> images`; nothing here knows more of a model than that it is called with
images, sigma and conditions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Denoiser = Callable[[Array, Array], Array]
"""`(noisy [B, H, W, C], sigma [B]) -> images [B, H, W, C]`."""


@dataclasses.dataclass(frozen=True)
class Preconditioning:
    """What stands between a network and noisy images, so that its inputs and targets have variance 1 at every noise level.

    `D(x) = c_skip x + c_out F(c_in x)`, with `s = sigma ** 2 + sigma_data ** 2`: `c_skip = sigma_data ** 2 / s`,
    `c_out = sigma sigma_data / sqrt(s)`, `c_in = 1 / sqrt(s)`.

    Args:
      sigma_data: standard deviation of the images.
    """

    sigma_data: float = 0.5

    def denoise(
        self,
        model: Any,
        noisy: Float[Array, "B H W C"],
        sigma: Float[Array, " B"],
        **conditions: Any,
    ) -> Float[Array, "B H W C"]:
        """The images that the model sees behind the noise; float32. `conditions` go to the model."""
        skip, out, into = self._factors(sigma)
        return skip * noisy + out * model(into * noisy, sigma, **conditions).astype(jnp.float32)

    def loss(
        self,
        model: Any,
        images: Float[Array, "B H W C"],
        noise: Float[Array, "B H W C"],
        sigma: Float[Array, " B"],
        **conditions: Any,
    ) -> Float[Array, " B"]:
        """Mean squared error of the network's output `F` for each image, given noise of variance 1."""
        skip, out, into = self._factors(sigma)
        noisy = images + noise * _per_image(sigma)
        output = model(into * noisy, sigma, **conditions).astype(jnp.float32)
        return jnp.square(output - (images - skip * noisy) / out).mean(axis=(1, 2, 3))

    def soft_min_snr(self, sigma: Float[Array, " B"]) -> Float[Array, " B"]:
        """Weights on `loss` (arXiv 2401.11605): less of what is nearly noise, and of what is nearly free of it."""
        product = sigma * self.sigma_data
        return jnp.square(product / (jnp.square(sigma) + self.sigma_data**2))

    def _factors(self, sigma: Array) -> tuple[Array, Array, Array]:
        sigma = _per_image(sigma.astype(jnp.float32))
        total = jnp.square(sigma) + self.sigma_data**2
        root = jax.lax.rsqrt(total)
        return self.sigma_data**2 / total, sigma * self.sigma_data * root, root


def guided(
    denoise: Callable[[Array, Array, Array], Array],
    class_labels: Int[Array, " B"],
    *,
    no_class: int,
    scale: float,
) -> Denoiser:
    """Classifier-free guidance (arXiv 2207.12598): `D(no class) + scale (D(class) - D(no class))`.

    Args:
      denoise: takes noisy images, sigma and class labels, at twice the batch.
      class_labels: what to show.
      no_class: the label that training put in place of some.
      scale: 1: no guidance.
    """
    labels = jnp.concatenate([class_labels, jnp.full_like(class_labels, no_class)])

    def run(noisy: Array, sigma: Array) -> Array:
        twice = jnp.concatenate([noisy, noisy]), jnp.concatenate([sigma, sigma])
        asked, free = jnp.split(denoise(*twice, labels), 2)
        return free + scale * (asked - free)

    return run


def noise_levels(
    steps: int, *, sigma_min: float = 0.01, sigma_max: float = 80.0, rho: float = 7.0
) -> np.ndarray:
    """`[steps + 1]`: from `sigma_max` down to `sigma_min` in equal steps of `sigma ** (1 / rho)`, then 0.

    Raises:
      ValueError: for fewer than 2 steps or levels that do not descend.
    """
    if steps < 2 or not 0 < sigma_min < sigma_max:
        raise ValueError(
            "noise_levels needs at least 2 steps and 0 < sigma_min < sigma_max;"
            f" got steps={steps}, sigma_min={sigma_min}, sigma_max={sigma_max}"
        )
    roots = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps)
    return np.append(roots**rho, 0.0).astype(np.float32)


def sample(
    denoise: Denoiser, noise: Float[Array, "B H W C"], sigmas: np.ndarray
) -> Float[Array, "B H W C"]:
    """Images from noise by DPM-Solver++(2M) (arXiv 2211.01095): one call of the denoiser per level, no further randomness.

    Args:
      denoise: the denoiser.
      noise: of variance 1.
      sigmas: falling levels that end in 0, as of `noise_levels`.
    """
    logs = -np.log(sigmas[:-1])
    step = np.diff(logs)
    # Between two levels the denoised image is extrapolated by the change since the level before; the first step has none.
    share = np.append(0.0, step[1:] / (2 * step[:-1])).astype(np.float32)
    keep = (sigmas[1:-1] / sigmas[:-2]).astype(np.float32)
    at = jnp.ones((len(noise),), jnp.float32)

    def one(carry: tuple[Array, Array], level: tuple[Array, ...]) -> tuple[Any, None]:
        x, before = carry
        sigma, share, keep = level
        now = denoise(x, at * sigma)
        ahead = now + share * (now - before)
        return (keep * x + (1 - keep) * ahead, now), None

    start = (noise * sigmas[0], jnp.zeros_like(noise))
    levels = tuple(jnp.asarray(values) for values in (sigmas[:-2], share, keep))
    (x, _), _ = jax.lax.scan(one, start, levels)
    return denoise(x, at * sigmas[-2])


def _per_image(sigma: Float[Array, " B"]) -> Float[Array, "B 1 1 1"]:
    return sigma[:, None, None, None]
