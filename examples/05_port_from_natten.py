"""Code that was written for NATTEN, in JAX: the same names, the same order of arguments, the same windows.

    python examples/05_port_from_natten.py

Eight seconds on two CPU cores. Last line: `na2d and na3d agree: True`

Everything that differs, such as gradients on a CPU: docs/from-natten.md.
"""

import jax
import numpy as np

import gna_jax

q, k, v = (
    jax.random.normal(key, (1, 14, 14, 2, 32)) for key in jax.random.split(jax.random.key(0), 3)
)

# PyTorch:  out = natten.na2d(q, k, v, kernel_size=7, dilation=2)
out = gna_jax.na2d(q, k, v, kernel_size=7, dilation=2)
print("na2d", out.shape)

# Knobs of NATTEN's kernels are not silently dropped: the error says what to write instead.
try:
    gna_jax.na2d(q, k, v, kernel_size=7, backend="cutlass-fna")
except TypeError as error:
    print("TypeError:", error)

# PyTorch:  out, lse = natten.na2d(..., return_lse=True); natten.merge_attentions([..], [..])
#           for text tokens beside an image. Here they are an argument, in the same softmax.
text_keys, text_values = (jax.random.normal(jax.random.key(s), (1, 5, 2, 32)) for s in (1, 2))
joint = gna_jax.gna(
    q, k, v, window_size=7, additional_keys=text_keys, additional_values=text_values
)
print("with text", joint.shape)

# An image is a video of one frame.
as_video = gna_jax.na3d(q[:, None], k[:, None], v[:, None], (1, 7, 7), dilation=(1, 2, 2))
print("na2d and na3d agree:", np.allclose(out, as_video[:, 0], atol=1e-6))
