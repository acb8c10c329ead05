"""The training loop that the examples share: a compiled step, checkpoints, exact resume, a progress bar, a curve.

What an image of a batch is and which random key it gets follow from the seed and the step's number alone. So a run that was
killed goes on from its last checkpoint to the same parameters, bit for bit. Read `train` first, then `make_step`.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of a backend that needs no screen

Loss = Callable[[Any, Array, Array, Array], Array]
"""`(model, keys [B], images [B, ..], labels [B]) -> mean loss`, each image with a random key of its own."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides a run's result, and is stored with its checkpoints.

    Args:
      steps: updates of the parameters.
      batch: images per update.
      seed: of the initial weights, the order of the data and all that is random in the loss.
      rate: the highest learning rate, after a warm-up over a tenth of the steps and before a cosine decay to 0.
      weight_decay: of AdamW, on parameters with more than one axis.
      accumulate: parts a batch is cut into, one after the other, for less memory.
      bf16: whether the model computes in bfloat16; parameters stay float32.
      average: decay of the running average of parameters that evaluations use.
    """

    steps: int
    batch: int
    seed: int
    rate: float
    weight_decay: float = 0.05
    accumulate: int = 1
    bf16: bool = False
    average: float = 0.998

    def __post_init__(self):
        if self.accumulate < 1 or self.batch % self.accumulate:
            raise ValueError(
                f"accumulate must divide the batch; got batch={self.batch}, accumulate={self.accumulate}"
            )

    @property
    def dtype(self) -> Any:
        """Of the model's computation."""
        return jnp.bfloat16 if self.bf16 else jnp.float32


@dataclasses.dataclass
class Run:
    """What training leaves.

    Args:
      model: with the average of the parameters.
      losses: of every step.
      scores: (step, score) whenever one was taken.
      seconds: of this process, compilation included.
    """

    model: Any
    losses: list[float]
    scores: list[tuple[int, float]]
    seconds: float


def train(
    settings: Settings,
    model: nnx.Module,
    loss: Loss,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    score: Callable[[Any], float] | None = None,
    score_every: int = 0,
    folder: Path | None = None,
    save_every: int = 0,
    sharding: NamedSharding | None = None,
) -> Run:
    """AdamW from the model's parameters on, or from the last checkpoint in `folder`.

    Args:
      settings: the run's.
      model: a fresh one.
      loss: what to minimize.
      images, labels: what to train on; every epoch goes through them in another order.
      score: of a model; shown beside the loss.
      score_every: steps between two scores. There is one at the end in any case.
      folder: of the checkpoints; None: none are written.
      save_every: steps between two checkpoints. There is one at the end in any case.
      sharding: of a batch's images over a mesh of devices, which may be those of several processes that all call
        `train` with the same arguments; the parameters are on every device. None: all is on the first device.

    Raises:
      ValueError: if the checkpoints in `folder` are of other settings.
    """
    graph, params, fixed = nnx.split(model, nnx.Param, ...)
    optimizer = make_optimizer(settings)
    state = first_state(params, optimizer)
    if sharding is not None:
        state = jax.tree.map(lambda x: place(x, NamedSharding(sharding.mesh, P())), state)
    run, first = Run(model, [], [], 0.0), 0
    checkpoints = None if folder is None else Checkpoints(folder, settings)
    if checkpoints is not None and checkpoints.last is not None:
        state, run.losses, run.scores = checkpoints.restore(state)
        first = len(run.losses)
    step = make_step(settings, optimizer, graph, fixed, loss, sharding)
    started = time.perf_counter()
    with progress_bar() as bar:
        task = bar.add_task(
            "compiling", total=settings.steps, completed=first, loss=np.nan, rate=0.0, score="  -  "
        )
        for number in range(first, settings.steps):
            pick = batch_of(settings, number, len(labels))
            batch = images[pick], labels[pick]
            if sharding is not None:
                batch = place_batch(*batch, sharding)
            state, value = step(state, number, *batch)
            run.losses.append(float(value))
            done = number + 1
            is_last = done == settings.steps
            if score is not None and (is_last or (score_every and done % score_every == 0)):
                run.scores.append((done, score(nnx.merge(graph, state["average"], fixed))))
                bar.update(task, score=f"{run.scores[-1][1]:.1%}")
            if checkpoints is not None and (is_last or (save_every and done % save_every == 0)):
                checkpoints.save(state, run)
            rate = (done - first) * settings.batch / (time.perf_counter() - started)
            bar.update(
                task, description="training ", completed=done, loss=run.losses[-1], rate=rate
            )
    run.seconds = time.perf_counter() - started
    run.model = nnx.merge(graph, state["average"], fixed)
    return run


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW with clipped gradients, warm-up and cosine decay."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.rate, max(1, settings.steps // 10), max(2, settings.steps)
    )
    decayed = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.99, weight_decay=settings.weight_decay, mask=decayed),
    )


def first_state(params: nnx.State, optimizer: optax.GradientTransformation) -> dict[str, Any]:
    """What steps change and checkpoints hold, before the first step."""
    # The average starts as a copy: a step takes over its state's memory, and two names for one array cannot give it away.
    average = jax.tree.map(jnp.copy, params)
    return {"params": params, "average": average, "optimizer": optimizer.init(params)}


def make_step(
    settings: Settings,
    optimizer: optax.GradientTransformation,
    graph: nnx.GraphDef,
    fixed: nnx.State,
    loss: Loss,
    sharding: NamedSharding | None = None,
) -> Callable[[Any, int, np.ndarray, np.ndarray], tuple[Any, Array]]:
    """`step(state, number, images, labels) -> (state, loss)`, compiled; the old state's memory becomes the new one's."""

    def loss_of(params: nnx.State, keys: Array, images: Array, labels: Array) -> Array:
        return loss(nnx.merge(graph, params, fixed), keys, images, labels).astype(jnp.float32)

    def mean_gradient(params: nnx.State, batch: Any) -> tuple[Array, nnx.State]:
        parts = settings.accumulate
        if parts == 1:
            return jax.value_and_grad(loss_of)(params, *batch)
        batch = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            value = jax.value_and_grad(loss_of)(params, *part)
            return jax.tree.map(lambda a, b: a + b / parts, total, value), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zeros, batch)[0]

    def step(state: Any, number: Array, images: Array, labels: Array) -> tuple[Any, Array]:
        key = jax.random.fold_in(jax.random.key(settings.seed), number)
        keys = jax.random.split(key, settings.batch)
        params = state["params"]
        value, gradient = mean_gradient(params, (keys, images, labels))
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"], params)
        params = optax.apply_updates(params, updates)
        # Early on the average forgets faster: its memory is a tenth of the steps so far.
        count = jnp.asarray(number, jnp.float32)
        keep = jnp.minimum(settings.average, (1 + count) / (10 + count))
        average = jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, state["average"], params)
        return {"params": params, "average": average, "optimizer": optimizer_state}, value

    # Left to itself, XLA may spread a parameter over the devices as it spread the gradient.
    everywhere = None if sharding is None else NamedSharding(sharding.mesh, P())
    return jax.jit(step, donate_argnums=0, out_shardings=everywhere)


def place(x: Any, sharding: NamedSharding) -> Array:
    """An array that every process holds, spread over the devices of all: each process takes its devices' parts."""
    return jax.make_array_from_process_local_data(sharding, np.asarray(x), x.shape)


def place_batch(
    images: np.ndarray, labels: np.ndarray, sharding: NamedSharding
) -> tuple[Array, Array]:
    """Images as `sharding` says, and labels as it says of the images' first axis."""
    of_labels = NamedSharding(sharding.mesh, P(sharding.spec[0]))
    return place(images, sharding), place(labels, of_labels)


def batch_of(settings: Settings, number: int, size: int) -> np.ndarray:
    """Indices of the images of a step; the last few of an epoch's order are left out if they are no whole batch."""
    if settings.batch > size:
        raise ValueError(
            f"a batch must not be larger than the data; got batch={settings.batch} of {size}"
        )
    epoch, part = divmod(number, size // settings.batch)
    order = np.random.default_rng([settings.seed, epoch]).permutation(size)
    return order[part * settings.batch :][: settings.batch]


class Checkpoints:
    """A run's states in a folder, the last two of them, each written whole or not at all.

    Args:
      folder: where they are; made if it is missing.
      settings: those of the run; None: any (to read only).
    """

    def __init__(self, folder: Path, settings: Settings | None = None):
        import orbax.checkpoint as ocp  # here, because it takes a second that runs without checkpoints need not wait for

        self._ocp, self._settings, self._folder = ocp, settings, folder
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.resolve() / "checkpoints", options=options)

    @property
    def last(self) -> int | None:
        """Steps done at the last checkpoint."""
        return self._manager.latest_step()

    def save(self, state: Any, run: Run) -> None:
        """Write the state after as many steps as the run has losses."""
        history = {
            "settings": dataclasses.asdict(self._settings),
            "losses": run.losses,
            "scores": run.scores,
        }
        parts = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(state), history=self._ocp.args.JsonSave(history)
        )
        self._manager.save(len(run.losses), args=parts)

    def restore(self, like: Any) -> tuple[Any, list[float], list[tuple[int, float]]]:
        """State, losses and scores of the last checkpoint; `like` is a state of the same shapes.

        Raises:
          ValueError: if there is none, or it is of other settings.
        """
        if self.last is None:
            raise ValueError(f"no checkpoint in {self._folder}; train first, or give its --out")
        args = self._ocp.args
        history = self._manager.restore(self.last, args=args.Composite(history=args.JsonRestore()))
        history = history["history"]
        if self._settings is not None:
            self._check(history["settings"])
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        restored = self._manager.restore(
            self.last, args=args.Composite(state=args.StandardRestore(abstract))
        )
        scores = [(int(step), float(score)) for step, score in history["scores"]]
        return restored["state"], history["losses"], scores

    def _check(self, stored: dict[str, Any]) -> None:
        mine = dataclasses.asdict(self._settings)
        other = [
            f"{name}={stored.get(name)}, now {mine[name]}"
            for name in mine
            if stored.get(name) != mine[name]
        ]
        if other:
            raise ValueError(
                f"a run goes on with the settings it began with; got in {self._folder}: {'; '.join(other)};"
                " give the same, or another --out, or --restart to lose that run"
            )


def load_average(folder: Path, model: nnx.Module, settings: Settings) -> Any:
    """A model with the averaged parameters of the last checkpoint in a folder.

    Raises:
      ValueError: if there is none.
    """
    graph, params, fixed = nnx.split(model, nnx.Param, ...)
    state, _, _ = Checkpoints(folder).restore(first_state(params, make_optimizer(settings)))
    return nnx.merge(graph, state["average"], fixed)


def prepare(out: Path, *, restart: bool) -> None:
    """The folder of a run, without the checkpoints of an earlier one if that is to be lost."""
    if restart:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)


def progress_bar() -> Progress:
    """Steps, loss, throughput, the last score and the time that is left; on stderr."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:4.0f} images/s"),
        TextColumn("held-out {task.fields[score]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=jax.process_index() > 0,
    )


def draw_curve(
    run: Run, path: Path, *, loss: str, goal: float | None = None, score: str = ""
) -> None:
    """The loss of every step, and smoothed; beside it the scores in percent, with a line at the goal, if there are any."""
    panels = 2 if run.scores else 1
    figure, axes = plt.subplots(
        1, panels, figsize=(5.5 * panels, 4), layout="constrained", squeeze=False
    )
    left = axes[0, 0]
    width = min(50, len(run.losses))
    smooth = np.convolve(run.losses, np.ones(width) / width, mode="valid")
    steps = np.arange(1, len(run.losses) + 1)
    left.plot(steps, run.losses, color="0.8", linewidth=0.7, label="each step")
    middle = np.arange(len(smooth)) + (width + 1) / 2
    left.plot(middle, smooth, color="tab:blue", label=f"mean of {width} steps")
    # The first steps' losses would hide what follows.
    left.set_ylim(0, 1.15 * max(np.percentile(run.losses, 98), smooth[len(smooth) // 10]))
    left.set(xlabel="step", ylabel=loss, title="Training loss")
    left.legend(frameon=False)
    if run.scores:
        right = axes[0, 1]
        steps, scores = zip(*run.scores, strict=True)
        right.plot(steps, 100 * np.array(scores), color="tab:green", marker="o", markersize=4)
        right.set(xlabel="step", ylabel="%", title=f"{score}: {scores[-1]:.1%}")
        if goal is not None:
            right.axhline(100 * goal, color="0.5", linestyle="--", linewidth=1)
            right.annotate(
                f"{goal:.1%}",
                (steps[-1], 100 * goal),
                textcoords="offset points",
                xytext=(0, -13),
                ha="right",
                color="0.4",
            )
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
