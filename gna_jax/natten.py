"""`na1d`, `na2d`, `na3d`: `gna` under NATTEN's names and in NATTEN's positional order.

For moving code over: arrays keep their layout, geometry its meaning. What differs stands in docs/from-natten.md.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from gna_jax.attention import gna
from gna_jax.neighborhood import Flags, Sizes

KNOBS = {
    "attention_kwargs": "additional keys run in the same softmax; there is nothing to configure",
    "backend": "use implementation=, e.g. implementation='xla'",
    "q_tile_shape": "use tiles=gna_jax.Tiles(q=..., kv=...)",
    "kv_tile_shape": "use tiles=gna_jax.Tiles(q=..., kv=...)",
    "backward_q_tile_shape": "use tiles=gna_jax.Tiles(..., backward_q=...)",
    "backward_kv_tile_shape": "use tiles=gna_jax.Tiles(..., backward_kv=...)",
    "backward_kv_splits": "the backward is deterministic without it; leave it out",
    "backward_use_pt_reduction": "there is no PyTorch reduction; leave it out",
    "run_persistent_kernel": "kernels choose their schedule; leave it out",
    "kernel_schedule": "kernels choose their schedule; leave it out",
    "torch_compile": "wrap the caller in jax.jit instead",
}
"""NATTEN's performance arguments, and what to write instead."""


def _alias(rank: int) -> Callable[..., Any]:
    def neighborhood_attention(
        query: Any,
        key: Any,
        value: Any,
        kernel_size: Sizes,
        stride: Sizes | None = 1,
        dilation: Sizes | None = 1,
        is_causal: Flags | None = False,
        scale: float | None = None,
        additional_keys: Any = None,
        additional_values: Any = None,
        *,
        return_lse: bool = False,
        **options: Any,
    ) -> Any:
        name = f"na{rank}d"
        _reject_knobs(name, options)
        axes = jnp.ndim(query) - 3
        if axes != rank:
            raise ValueError(
                f"{name} takes query of shape [batch, {rank} spatial axes, heads, head_dim]; got shape"
                f" {jnp.shape(query)}; "
                + (
                    f"use na{axes}d or gna"
                    if axes in (1, 2, 3)
                    else "add the axes that are missing"
                )
            )
        return gna(
            query,
            key,
            value,
            window_size=kernel_size,
            stride=1 if stride is None else stride,
            dilation=1 if dilation is None else dilation,
            is_causal=False if is_causal is None else is_causal,
            scale=scale,
            additional_keys=additional_keys,
            additional_values=additional_values,
            return_lse=return_lse,
            **options,
        )

    neighborhood_attention.__name__ = neighborhood_attention.__qualname__ = f"na{rank}d"
    neighborhood_attention.__doc__ = (
        f"`gna` on {rank} spatial ax{'is' if rank == 1 else 'es'}, with NATTEN's argument names and order.\n\n"
        "`kernel_size` is `window_size`; None for stride, dilation or is_causal means the default. Further keyword\n"
        "arguments are those of `gna`. NATTEN's performance arguments raise a TypeError that names ours."
    )
    return neighborhood_attention


na1d = _alias(1)
na2d = _alias(2)
na3d = _alias(3)


def _reject_knobs(name: str, options: dict[str, Any]) -> None:
    """TypeError for a NATTEN knob that was set; None, NATTEN's "unset", is dropped."""
    for knob, advice in KNOBS.items():
        if options.pop(knob, None) is not None:
            raise TypeError(f"{name} does not take NATTEN's {knob}: {advice}")
