"""Worker of the torch implementations: compiled flex_attention, and scaled_dot_product_attention with and without a mask.

    python benchmarks/peers_torch.py flex|masked|dense MEMORY_LIMIT_BYTES       (started by `rounds.py`)

Runs under torch's own interpreter, Python 3.10 or later. Arrays are `[B, N, tokens, H]`, torch's layout, laid out so before timing.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from worker import BOTH, FORWARD, Call, Task, Unavailable, limit_memory, serve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

FLEX_BLOCK = 32
"""Tokens per block of flex_attention's block mask: as fast on a CPU as 16 or 64, faster than the default of 128."""


def flex(task: Task) -> Call:
    """Compiled flex_attention with a block mask of the neighborhood."""
    if task.direction == BOTH:
        _check_flex_backward()
    torch.compiler.reset()  # or the compiled shapes of earlier tasks count against dynamo's limit
    tokens = int(np.prod(task.layout))
    block_mask = create_block_mask(
        _sees(task), None, None, tokens, tokens, device="cpu", BLOCK_SIZE=FLEX_BLOCK
    )
    attend = torch.compile(flex_attention, dynamic=False)
    return prepared(task, lambda q, k, v: attend(q, k, v, block_mask=block_mask))


def masked(task: Task) -> Call:
    """scaled_dot_product_attention with the neighborhood as a bool mask."""
    mask = torch.from_numpy(task.visible())[None, None]
    return prepared(task, lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask))


def dense(task: Task) -> Call:
    """scaled_dot_product_attention of every token to every token: another answer, the usual way out."""
    return prepared(task, scaled_dot_product_attention)


def prepared(task: Task, attention: Attention) -> Call:
    """`attention(query, key, value)`, or its output together with the three gradients."""
    inputs = [_heads_first(task, name) for name in ("query", "key", "value")]

    def forward() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (attention(*inputs),)

    def forward_and_gradients() -> tuple[torch.Tensor, ...]:
        out = attention(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, cotangent)

    def to_numpy(outputs: Any) -> list[np.ndarray]:
        return [x.transpose(1, 2).float().numpy() for x in outputs]

    if task.direction == FORWARD:
        return Call(forward, to_numpy)
    for x in inputs:
        x.requires_grad_()
    cotangent = _heads_first(task, "cotangent")
    return Call(forward_and_gradients, to_numpy)


def _sees(task: Task) -> Callable[..., torch.Tensor]:
    """flex_attention's `mask_mod`: is the key's coordinate inside the query's interval on every axis?

    Coordinates and intervals are looked up per token: dividing token indices inside the kernel takes several times longer.
    """
    coordinates = np.unravel_index(np.arange(int(np.prod(task.layout))), tuple(task.layout))
    tables = [
        tuple(
            torch.from_numpy(table.astype(np.int32)) for table in (place, first[place], end[place])
        )
        for place, (first, end) in zip(coordinates, task.intervals(), strict=True)
    ]

    def mask_mod(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        seen = None
        for place, first, end in tables:
            inside = (first[query] <= place[key]) & (place[key] < end[query])
            seen = inside if seen is None else seen & inside
        return seen

    return mask_mod


def _check_flex_backward() -> None:
    """Raise Unavailable if this torch has no flex_attention backward on a CPU (2.13 has none)."""
    x = torch.zeros(1, 1, 128, 16, requires_grad=True)
    try:
        torch.compile(flex_attention)(x, x, x).sum().backward()
    except NotImplementedError as error:
        raise Unavailable("no backward on CPU") from error


def _heads_first(task: Task, name: str) -> torch.Tensor:
    array = torch.from_numpy(task.flat(name)).to(DTYPES[task.dtype])
    return array.transpose(1, 2).contiguous()


def _version() -> str:
    """torch's version, its Python, and what its compiled and its own kernels run on: all three move the numbers."""
    return (
        f"{torch.__version__} (Python {sys.version.split()[0]}, {torch.get_num_threads()} threads,"
        f" {torch.backends.cpu.get_cpu_capability()} kernels, compiled for {pick_vec_isa()})"
    )


PEERS = {"flex": flex, "masked": masked, "dense": dense}

if __name__ == "__main__":
    limit_memory(int(sys.argv[2]))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    serve({"torch": _version()}, PEERS[sys.argv[1]])
