// Which keys a query sees on one axis: the mirror of `gna_jax/neighborhood.py`, and the only other
// place with window rules.
//
// A token at position i of an axis belongs to the dilation group i % dilation and is number i /
// dilation of it. Positions and lengths below count tokens of one group, as `Axis::window` and
// `Axis::stride` do.
#ifndef GNA_NEIGHBORHOOD_H_
#define GNA_NEIGHBORHOOD_H_

#include "problem.h"

namespace gna {

// Positions [first, end) on one axis; empty where end <= first.
struct Interval {
  int first;
  int end;
};

// Tokens of an axis of `length` whose position leaves `residue` when divided by `dilation`:
// ceil((length - residue) / dilation). Mirrors `neighborhood.group_length`.
GNA_HOST_DEVICE int group_length(int length, int dilation, int residue) {
  return ceil_quotient(length - residue, dilation);
}

// The query whose window all queries of the stride group [g * stride, (g + 1) * stride) share: its
// middle, g * stride + stride / 2, or, causal, its last; at most the group's last token. Mirrors
// `AxisNeighborhood.leader`.
GNA_HOST_DEVICE int leader(const Axis& axis, int query, int length) {
  const int group_start = quotient(query, axis.stride) * axis.stride;
  return minimum(group_start + (axis.is_causal ? axis.stride - 1 : axis.stride / 2), length - 1);
}

// Keys that `query` sees in a dilation group of `length` tokens. Mirrors `AxisNeighborhood.keys`.
//
// Non-causal: first = clamp(leader - window / 2, 0, length - window), end = first + window: at an
// edge the window slides inside. Causal: first = max(leader - window + 1, 0), end = query + 1.
GNA_HOST_DEVICE Interval keys(const Axis& axis, int query, int length) {
  const int window = minimum(axis.window, length);
  const int centre = leader(axis, query, length);
  const int causal_first = maximum(centre - window + 1, 0);
  const int first = minimum(maximum(centre - window / 2, 0), length - window);
  return axis.is_causal ? Interval{causal_first, query + 1} : Interval{first, first + window};
}

}  // namespace gna

#endif  // GNA_NEIGHBORHOOD_H_
