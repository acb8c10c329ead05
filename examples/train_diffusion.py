"""Train HDiT, the hourglass diffusion transformer, to write digits, and let a classifier judge what it wrote.

    python examples/train_classifier.py
    python examples/train_diffusion.py --judge demo/classifier

Eleven minutes on two CPU cores; the classifier then takes 94.5 % of 200 samples for the digit asked for
(`docs/pictures/diffusion-samples.png`). It leaves checkpoints, `curve.png` and `samples.png` in `--out`; killed and started
again it goes on where it was, to the same parameters. Without `--judge` nobody counts.

Read `diffusion_loss` and `write_digits`; preconditioning, guidance and sampler are in `gna_jax/models/hdit_diffusion.py`, the
loop in `training.py`, the data in `digits.py`.
"""

from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import typer
from digits import load_digits
from flax import nnx
from jaxtyping import Array, Float, Int
from rich.console import Console
from train_classifier import classify, micro_nat
from training import Settings, draw_curve, load_average, prepare, train

from gna_jax.models.hdit_diffusion import Preconditioning, guided, noise_levels, sample
from gna_jax.models.hdit_model import HDiT, hdit

NO_CLASS = 10
DROPPED_LABELS = 0.1
SCALING = Preconditioning(sigma_data=0.6)  # the digits' deviation, in [-1, 1]
CENTER, SPREAD = -0.4, 1.2  # of the normal distribution of log(sigma) in training
PER_CLASS = 20
console = Console()


def diffusion_loss(
    model: HDiT, keys: Array, images: Float[Array, "B 28 28"], labels: Int[Array, " B"]
) -> Array:
    """Squared error of the preconditioned network, each image with its own noise and noise level; some labels dropped."""

    def draws(key: Array) -> tuple[Array, Array, Array]:
        of_noise, of_level, of_label = jax.random.split(key, 3)
        noise = jax.random.normal(of_noise, (28, 28, 1))
        level = CENTER + SPREAD * jax.random.normal(of_level)
        return noise, jnp.exp(level), jax.random.bernoulli(of_label, DROPPED_LABELS)

    noise, sigma, is_dropped = jax.vmap(draws)(keys)
    labels = jnp.where(is_dropped, NO_CLASS, labels)
    images = (2 * images - 1)[..., None]
    return SCALING.loss(model, images, noise, sigma, class_labels=labels).mean()


def write_digits(
    model: HDiT, labels: Int[np.ndarray, " B"], *, seed: int, guidance: float, levels: int
) -> Float[np.ndarray, "B 28 28"]:
    """Images in [0, 1] of the digits asked for."""

    @nnx.jit
    def run(model: HDiT, noise: Array, labels: Array) -> Array:
        def denoise(noisy: Array, sigma: Array, labels: Array) -> Array:
            return SCALING.denoise(model, noisy, sigma, class_labels=labels)

        towards = guided(denoise, labels, no_class=NO_CLASS, scale=guidance)
        return sample(towards, noise, noise_levels(levels))

    noise = jax.random.normal(jax.random.key(seed), (len(labels), 28, 28, 1))
    images = run(model, noise, jnp.asarray(labels, jnp.int32))
    return np.clip((np.asarray(images)[..., 0] + 1) / 2, 0.0, 1.0)


def draw_samples(images: Float[np.ndarray, "B 28 28"], path: Path) -> None:
    """A row per digit; `images` are sorted by digit."""
    rows = images.reshape(10, -1, 28, 28)
    framed = np.pad(rows, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=0.5)
    grid = np.concatenate([np.concatenate(list(row), axis=1) for row in framed])
    plt.imsave(path, np.kron(1 - grid, np.ones((2, 2))), cmap="gray", vmin=0.0, vmax=1.0)


def main(
    steps: Annotated[int, typer.Option(help="training steps")] = 3000,
    batch: Annotated[int, typer.Option(help="images per step")] = 32,
    seed: Annotated[int, typer.Option(help="of the split, the weights and all noise")] = 0,
    accumulate: Annotated[int, typer.Option(help="parts of a batch, for less memory")] = 1,
    bf16: Annotated[bool, typer.Option(help="compute in bfloat16")] = False,
    save_every: Annotated[int, typer.Option(help="steps between two checkpoints")] = 500,
    restart: Annotated[bool, typer.Option(help="lose the run in --out, if any")] = False,
    guidance: Annotated[float, typer.Option(help="of the samples; 1: none")] = 3.0,
    levels: Annotated[int, typer.Option(help="noise levels that a sample goes through")] = 24,
    judge: Annotated[
        Path | None, typer.Option(help="--out of train_classifier.py; it says what it sees")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of checkpoints and pictures")] = Path(
        "demo/diffusion"
    ),
) -> None:
    """Train on 4,000 digits and write 200 new ones; go on with the run in --out if there is one."""
    settings = Settings(
        steps, batch, seed, rate=2e-3, weight_decay=0.01, accumulate=accumulate, bf16=bf16
    )
    prepare(out, restart=restart)
    digits = load_digits(seed)
    model = hdit("digits", dtype=settings.dtype, rngs=nnx.Rngs(seed))
    run = train(
        settings,
        model,
        diffusion_loss,
        digits.images,
        digits.labels,
        folder=out,
        save_every=save_every,
    )
    recent = np.mean(run.losses[-100:])
    console.print(
        f"loss {recent:.4f} over the last steps; training took {run.seconds:.0f} s ({steps} steps of {batch})",
        soft_wrap=True,
    )
    draw_curve(run, out / "curve.png", loss="squared error of the network's output")
    asked = np.repeat(np.arange(10), PER_CLASS)
    images = write_digits(run.model, asked, seed=seed, guidance=guidance, levels=levels)
    draw_samples(images, out / "samples.png")
    console.print(f"pictures: {out / 'curve.png'}, {out / 'samples.png'}", soft_wrap=True)
    if judge is not None:
        classifier = load_average(judge, micro_nat(Settings(1, 1, 0, 1.0)), Settings(1, 1, 0, 1.0))
        right = np.asarray(classify(classifier, jnp.asarray(images))) == asked
        by_digit = " ".join(f"{d}:{n}" for d, n in enumerate(right.reshape(10, -1).sum(axis=1)))
        console.print(
            f"the classifier sees the digit asked for in {right.mean():.1%} of {len(right)} samples"
            f" (of {PER_CLASS} each, {by_digit})",
            soft_wrap=True,
        )


if __name__ == "__main__":
    typer.run(main)
