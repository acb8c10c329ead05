"""Random window rules and layouts for the tests of the simulator."""

from gna_jax.neighborhood import WHOLE_GROUP, Neighborhood


def random_rule(random, longest, rank):
    """A neighborhood and a layout that fits it, at most `longest` tokens per axis."""
    layout = tuple(int(n) for n in random.integers(1, longest + 1, rank))
    rules = []
    for length in layout:
        dilation = int(random.integers(1, min(length, 3) + 1))
        window = int(random.integers(1, length // dilation + 1))
        stride = int(random.integers(1, window + 1))
        window = WHOLE_GROUP if random.random() < 0.2 else window
        rules.append((window, stride, dilation, bool(random.random() < 0.3)))
    return Neighborhood(*zip(*rules, strict=True)), layout
