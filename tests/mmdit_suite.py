"""What the tests of FLUX.1 and HunyuanVideo share: goldens, and joint attention written densely."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from gna_jax import Neighborhood

GOLDENS = pathlib.Path(__file__).with_name("golden")


def golden(name):
    """Inputs and the output that diffusers computed."""
    tensors = load_file(GOLDENS / f"{name}.safetensors")
    inputs = {k.removeprefix("inputs."): v for k, v in tensors.items() if k.startswith("inputs.")}
    return {k: jnp.asarray(v) for k, v in inputs.items()}, tensors["outputs.velocity"]


def golden_weights(name, folder, change=lambda tensors: None):
    """The golden's weights as a checkpoint file of their own, after `change`."""
    tensors = load_file(GOLDENS / f"{name}.safetensors")
    weights = {
        k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")
    }
    change(weights)
    path = folder / f"{name}.safetensors"
    save_file(weights, path)
    return path


def dense_joint(
    query, key, value, text_query, text_key, text_value, *, text_lengths=None, **options
):
    """`gna_joint` by one dense softmax under a mask."""
    geometry = {k: v for k, v in options.items() if k not in ("implementation", "tiles", "spec")}
    layout, text = query.shape[1:-2], text_query.shape[1]
    tokens = int(np.prod(layout))
    rule = Neighborhood.of(len(layout), **geometry)
    mask = np.ones((tokens + text, tokens + text), bool)
    mask[:tokens, :tokens] = rule.mask(layout).reshape(tokens, tokens)
    mask = jnp.asarray(mask)[None]
    if text_lengths is not None:
        shown = jnp.arange(tokens + text)[None] < tokens + text_lengths[:, None]
        mask = mask & shown[:, None, :]
    pairs = ((query, text_query), (key, text_key), (value, text_value))
    q, k, v = (
        jnp.concatenate([image.reshape(image.shape[0], tokens, *image.shape[-2:]), words], axis=1)
        for image, words in pairs
    )
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
    out = jnp.einsum("bnqk,bknv->bqnv", weights, v)
    return out[:, :tokens].reshape(query.shape), out[:, tokens:]


def run(model, inputs, rules=None):
    """The model's output, compiled."""
    return nnx.jit(lambda model, inputs: model(**inputs, rules=rules))(model, inputs)


def gradients(model, inputs, rules=None):
    """The output, and by parameter the gradient of a loss that weighs all its numbers differently."""

    def loss(model, inputs):
        out = model(**inputs, rules=rules)
        weights = np.random.default_rng(1).normal(size=out.shape).astype(np.float32)
        return jnp.sum(out * jnp.asarray(weights)), out

    grads, out = nnx.jit(nnx.grad(loss, has_aux=True))(model, inputs)
    named = {".".join(map(str, path)): g for path, g in nnx.to_flat_state(grads)}
    return out, {name: np.asarray(gradient[...]) for name, gradient in named.items()}
