"""Train one model on two processes, as on two hosts of a cluster: each holds half of every image.

    python examples/train_two_processes.py

Both run on this machine, with two CPU devices each. One holds the upper rows of every image's tokens, the other the lower ones; the
two devices of a process hold different images. Neighborhood attention exchanges the three rows on each side of the seam; all else
that the devices tell each other are sums, of gradients and at the mean over the tokens. One process alone finds the same parameters.

Kill one of the two while they train, and the other is stopped. Give the same command again, and they go on from the last
checkpoint to the same parameters, bit for bit.

On a cluster a scheduler starts the processes, with `--cluster`. Read `Classifier`, `mesh_of`, `main`; the loop is in `training.py`,
`launch.py` starts processes on this machine.
"""

import sys
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import optax
import typer
from digits import load_digits
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from launch import ProcessDiedError, end_with_launcher, start_processes, wait_for
from rich.console import Console
from training import Settings, draw_curve, place_batch, prepare, train

from gna_jax.flax import GNAttention

SIDE, PATCH = 16, 2  # tokens along a side of an image, pixels along a side of a token
WINDOW = (7, 7)
WIDTH, LAYERS = 32, 2
HELD_OUT = 1000
SPEC = P("data", "rows", None, None, None)  # of [B, Y, X, heads, head_dim]
TOKENS = P(*SPEC[:-1])  # of [B, Y, X, C]
console = Console()


# --- the model ------------------------------------------------------------------------------------------------


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`. Only the attention looks at other tokens."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm_1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = GNAttention(
            width // 16, width, window_size=WINDOW, spec=SPEC, use_bias=False, rngs=rngs
        )
        self.norm_2 = nnx.LayerNorm(width, rngs=rngs)
        self.expand = nnx.Linear(width, 2 * width, rngs=rngs)
        self.contract = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Tokens to tokens."""
        x = x + self.attention(self.norm_1(x))
        return x + self.contract(jax.nn.gelu(self.expand(self.norm_2(x))))


class Classifier(nnx.Module):
    """Tokens of 2x2 pixels -> blocks -> mean -> 10 logits. That tokens are sharded shows in `spec` alone."""

    def __init__(self, width: int, layers: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Linear(PATCH * PATCH, width, rngs=rngs)
        self.position = nnx.Param(0.02 * rngs.params.normal((1, SIDE, SIDE, width)))
        self.blocks = nnx.List([Block(width, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, tokens: Float[Array, "B Y X pixels"]) -> Float[Array, "B 10"]:
        """Images to logits."""
        x = self.embed(tokens) + self.position[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=(1, 2)))


def cut(images: Float[np.ndarray, "B 28 28"]) -> Float[np.ndarray, "B Y X pixels"]:
    """Images as tokens; a border of two pixels makes them 32x32."""
    border = (SIDE * PATCH - images.shape[1]) // 2
    images = np.pad(images, ((0, 0), (border, border), (border, border)))
    tokens = images.reshape(-1, SIDE, PATCH, SIDE, PATCH).swapaxes(2, 3)
    return tokens.reshape(-1, SIDE, SIDE, PATCH * PATCH)


def classifier_loss(
    model: Classifier,
    keys: Array,
    tokens: Float[Array, "B Y X pixels"],
    labels: Int[Array, " B"],
) -> Array:
    """Cross-entropy with labels smoothed by 0.1."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1)
    return optax.softmax_cross_entropy(model(tokens), targets).mean()


@nnx.jit
def accuracy(
    model: Classifier, tokens: Float[Array, "B Y X pixels"], labels: Int[Array, " B"]
) -> Float[Array, ""]:
    """Share of the images that are recognized."""
    return (model(tokens).argmax(axis=-1) == labels).mean()


# --- devices and processes --------------------------------------------------------------------------------------


def mesh_of(devices: list[jax.Device], processes: int) -> Mesh:
    """Along axis "rows" lie the processes, along "data" the devices of one of them."""
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    grid = np.array(devices).reshape(processes, -1)
    return Mesh(grid.T, ("data", "rows"), axis_types=(AxisType.Auto,) * 2)


def check_sizes(processes: int, devices: int, batch: int) -> None:
    """Raise typer.BadParameter unless rows and images can be cut into equal parts."""
    if processes < 1 or SIDE % processes:
        raise typer.BadParameter(
            f"each process holds as many of the {SIDE} rows of tokens; got {processes} processes;"
            " take 1, 2, 4, 8 or 16"
        )
    if devices < 1 or batch % devices or HELD_OUT % devices:
        raise typer.BadParameter(
            f"the devices of a process hold as many images each, of a batch and of the {HELD_OUT} held out;"
            f" got batch={batch} on {devices} devices"
        )


def main(
    processes: Annotated[int, typer.Option(help="of the program, on this machine")] = 2,
    devices_per_process: Annotated[int, typer.Option(help="CPU devices of each")] = 2,
    steps: Annotated[int, typer.Option(help="training steps")] = 500,
    batch: Annotated[int, typer.Option(help="images per step")] = 16,
    seed: Annotated[int, typer.Option(help="of the split and the weights")] = 0,
    save_every: Annotated[int, typer.Option(help="steps between two checkpoints")] = 50,
    restart: Annotated[bool, typer.Option(help="lose the run in --out, if any")] = False,
    out: Annotated[Path, typer.Option(help="folder of checkpoints and picture")] = Path(
        "demo/two_processes"
    ),
    cluster: Annotated[
        bool, typer.Option(help="be one of the processes that SLURM, MPI or Kubernetes started")
    ] = False,
    coordinator: Annotated[
        str, typer.Option(help="host:port of process 0: be one of --processes")
    ] = "",
    process: Annotated[int, typer.Option(help="which one to be")] = 0,
) -> None:
    """Train on 4,000 digits and test on 1,000 others; go on with the run in --out if there is one."""
    if not cluster and not coordinator:
        check_sizes(processes, devices_per_process, batch)
        launch([sys.executable, *sys.argv], processes, devices_per_process, out)
        return
    if cluster:
        jax.distributed.initialize()
    else:
        end_with_launcher()
        # Its launcher sees at once when one dies, so silence means a busy machine.
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=3600)
    check_sizes(jax.process_count(), jax.local_device_count(), batch)
    if jax.process_index() == 0:
        prepare(out, restart=restart)
    multihost_utils.sync_global_devices("the folder is there")
    settings = Settings(steps, batch, seed, rate=2e-3)
    train_digits(settings, mesh_of(jax.devices(), jax.process_count()), out, save_every)


def launch(command: list[str], processes: int, devices: int, out: Path) -> None:
    """Run a command in so many processes at once. Raises SystemExit if one ends badly."""
    out.mkdir(parents=True, exist_ok=True)
    started = start_processes(command, processes=processes, devices=devices, logs=out)
    pids = ", ".join(str(process.pid) for process in started)
    console.print(f"{processes} processes of {devices} devices: {pids}", soft_wrap=True)
    try:
        wait_for(started)
    except ProcessDiedError as error:
        raise SystemExit(
            f"{error}; process 0 wrote to this terminal, the others to {out}/process_*.log;"
            " the same command goes on from the last checkpoint"
        ) from None


def train_digits(settings: Settings, mesh: Mesh, out: Path, save_every: int) -> None:
    """What every process does alike; the first one tells of it."""
    digits = load_digits(settings.seed)
    sharding = NamedSharding(mesh, TOKENS)
    held_out = place_batch(cut(digits.held_out_images), digits.held_out_labels, sharding)
    model = Classifier(WIDTH, LAYERS, rngs=nnx.Rngs(settings.seed))
    with jax.set_mesh(mesh):
        run = train(
            settings,
            model,
            classifier_loss,
            cut(digits.images),
            digits.labels,
            score=lambda model: float(accuracy(model, *held_out)),
            score_every=100,
            folder=out,
            save_every=save_every,
            sharding=sharding,
        )
    if jax.process_index() == 0:
        console.print(
            f"held-out accuracy {run.scores[-1][1]:.1%}, last loss {run.losses[-1]:.4f};"
            f" {run.seconds:.0f} s on {mesh.size} devices of {jax.process_count()} processes",
            soft_wrap=True,
        )
        draw_curve(
            run,
            out / "curve.png",
            loss="cross-entropy (labels smoothed by 0.1)",
            score="Held-out accuracy",
        )


if __name__ == "__main__":
    typer.run(main)
