"""Worker of torch's compiled flex_attention with the mask of a case. One JSON line in, one JSON line out.

python benchmarks/published/torch_flex.py cuda|cpu       (started by `torch_process.py`)

Runs under torch's own interpreter, Python 3.10 or later, and needs numpy and torch alone. The tokens lie in the order of tiles of
128, as block masks need them to be in two and three dimensions; bringing a model's tokens into that order is not timed.
"""

import json
import os
import sys
import time

import numpy as np
import torch
from blocks import BLOCK, block_kinds, tile_of, tile_order
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

SAMPLED = 16


class Flex:
    """flex_attention on one case, compiled, compared and ready to be timed."""

    def __init__(self, order, device):
        torch.compiler.reset()  # or the compiled shapes of earlier cases count against dynamo's limit
        layout = tuple(order["layout"])
        tile = tile_of(layout)
        coordinates = tile_order(layout, tile)
        on_device = lambda array: torch.from_numpy(array.astype(np.int32)).to(device)
        tables = [
            tuple(on_device(array) for array in (*(np.asarray(x)[place] for x in bounds), place))
            for place, bounds in zip(coordinates, order["intervals"], strict=True)
        ]
        mask_mod = self._sees = sees(tables)
        tokens = int(np.prod(layout))
        if all(length % size == 0 for length, size in zip(layout, tile, strict=True)):
            mask = block_mask(order["intervals"], layout, tile, mask_mod, device)
        else:
            compiled = device != "cpu"
            mask = create_block_mask(
                mask_mod, None, None, tokens, tokens, device=device, _compile=compiled
            )
        attend = torch.compile(flex_attention, dynamic=False)
        on_bias = {}
        shape = (order["batch"], order["heads"], tokens, order["head_dim"])
        generator = torch.Generator(device).manual_seed(0)
        draw = lambda: torch.randn(
            shape, dtype=getattr(torch, order["dtype"]), device=device, generator=generator
        )
        self.inputs, self.cotangent = [draw() for _ in range(3)], draw()
        self.bias, self._entry = None, None
        if order["bias_shape"]:
            heads, *sizes = order["bias_shape"]
            self.bias = torch.randn(heads, int(np.prod(sizes)), dtype=self.inputs[0].dtype, device=device, generator=generator)  # fmt: skip
            self._entry = entry_of([place for _, _, place in tables], sizes)
            on_bias = {"score_mod": adds(self.bias, self._entry)}
        self._leaves = [*self.inputs, *([] if self.bias is None else [self.bias])]
        if order["direction"] == "forward":
            self.run = lambda: attend(*self.inputs, block_mask=mask, **on_bias)
        else:
            for x in self._leaves:
                x.requires_grad_()
            out = attend(*self.inputs, block_mask=mask, **on_bias)
            self.gradients = lambda cotangent: torch.autograd.grad(
                out, self._leaves, cotangent, retain_graph=True
            )
            self.run = lambda: self.gradients(self.cotangent)
        self._wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self._direction = order["direction"]

    def errors(self):
        """Against float32 attention of a few queries, as a share of the largest entry."""
        tokens, device = self.inputs[0].shape[2], self.inputs[0].device
        sample = torch.linspace(0, tokens - 1, SAMPLED, device=device).long()
        q, k, v = (x.detach()[:1] for x in self.inputs)
        keys = torch.arange(tokens, device=device)
        seen = self._sees(None, None, sample[:, None], keys[None, :])
        q, k, v = (x.float().requires_grad_() for x in (q[:, :, sample], k, v))
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        leaves = [q, k, v]
        if self.bias is not None:
            leaves.append(self.bias.detach().float().requires_grad_())
            scores = scores + leaves[3][:, self._entry(sample[:, None], keys[None, :])]
        out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
        if self._direction == "forward":
            return {"out": error(self.run()[:1, :, sample], out)}
        cotangent = torch.zeros_like(self.cotangent)
        cotangent[:1, :, sample] = self.cotangent[:1, :, sample]
        want = torch.autograd.grad(out, leaves, self.cotangent[:1, :, sample].float())
        gradients = self.gradients(cotangent)
        got = [*(x[:1] for x in gradients[:3]), *gradients[3:]]
        got[0] = got[0][:, :, sample]
        names = ("d query", "d key", "d value", "d relative_position_bias")[: len(got)]
        return {name: error(a, b) for name, a, b in zip(names, got, want, strict=True)}

    def seconds_per_call(self, calls):
        """Mean of `calls` queued calls, waited for once, after an untimed one."""
        with torch.set_grad_enabled(self._direction != "forward"):
            self.run()
            self._wait()
            started = time.perf_counter()
            for _ in range(calls):
                self.run()
            self._wait()
            return (time.perf_counter() - started) / calls


def sees(tables):
    """flex_attention's `mask_mod` from `(first, end, place)` of every token and axis."""

    def mask_mod(batch, head, query, key):
        seen = None
        for first, end, place in tables:
            inside = (first[query] <= place[key]) & (place[key] < end[query])
            seen = inside if seen is None else seen & inside
        return seen

    return mask_mod


def entry_of(places, sizes):
    """Numbers of the bias entries of pairs, in a table of these sizes: `2 * window - 1` per axis; any where they do not attend."""

    def entry(query, key):
        number = 0
        for place, size in zip(places, sizes, strict=True):
            offset = place[key] - place[query] + size // 2
            number = number * size + offset.clamp(0, size - 1)
        return number

    return entry


def adds(bias, entry):
    """flex_attention's `score_mod` from a table `[heads, entries]`."""
    return lambda score, batch, head, query, key: score + bias[head, entry(query, key)]


def block_mask(intervals, layout, tile, mask_mod, device):
    """The block mask of tokens in tile order, counted rather than scanned: all pairs of 100,000 tokens take minutes."""
    any_pair, full = block_kinds(intervals, layout, tile)

    def lists(blocks):
        order = np.argsort(~blocks, axis=1, kind="stable")
        arrays = (blocks.sum(1)[None, None], order[None, None])
        return (torch.from_numpy(x.astype(np.int32)).to(device) for x in arrays)

    return BlockMask.from_kv_blocks(
        *lists(any_pair & ~full), *lists(full), BLOCK_SIZE=BLOCK, mask_mod=mask_mod
    )


def error(got, want):
    """Largest difference as a share of the largest wanted entry."""
    return float((got.float() - want).abs().max().detach() / want.abs().max().detach())


def serve(device):
    """Answer orders from standard input until it closes."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries may print
    replies.write(json.dumps({"torch": torch.__version__}) + "\n")
    flex = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if order["do"] == "prepare":
                flex = None
                if device == "cuda":
                    torch.cuda.empty_cache()
                flex = Flex(order, device)
                reply = {"errors": flex.errors()}
            else:
                reply = {"seconds": flex.seconds_per_call(order["calls"])}
        except Exception as problem:
            reply = {"failed": " ".join(f"{type(problem).__name__}: {problem}".split())[:300]}
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    serve(sys.argv[1])
