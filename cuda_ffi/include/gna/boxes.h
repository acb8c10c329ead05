// Where tiles lie in memory: boxes of tokens straight from [B, *space, heads, H], no permutation.
// Mirrors `pallas_kernels/token_boxes.py`.
//
// The tokens of a dilation group lie `dilation` apart, so on every axis they are a strided
// dimension of a tensor copy (TMA). A copy has five dimensions, from the fastest: a column, the
// group's tokens on axis 2, a row of memory, the tokens on axis 1 and on axis 0. The column is the
// residue of axis 2, the head and the entry of the head at once, (residue * heads + head) * H +
// entry; the row is the batch entry and the residues of axes 0 and 1, (batch * Z + residue0) * Y +
// residue1, in steps of X * heads * H elements. That is `TokenArray`'s [B, Z/dz, dz, Y/dy, dy,
// X/dx, dx * heads * H] with B, dz and dy as one dimension, over which those of Z/dz and Y/dy lie,
// as strides may.
//
// As there, Z, Y and X are tokens in memory: an axis that its dilation does not divide is rounded
// up in every array (zeros in query, key and value; anything in out and lse), so all groups have
// room for as many tokens (`stored_length`).
#ifndef GNA_BOXES_H_
#define GNA_BOXES_H_

#include "tiling.h"

namespace gna {

// Dimensions of a tensor copy.
constexpr int kViewRank = 5;

// An array [B, *space, heads, H] as a tensor copy sees it: extents, and strides in elements,
// fastest dimension first; the first stride is 1.
struct TokenView {
  int64_t extents[kViewRank];
  int64_t strides[kViewRank];
};

// One int per dimension of a `TokenView`: the first element of a box, or its extents.
struct BoxCoordinates {
  int of[kViewRank];
};

// Where a box lies: batch entry, head of the array, and per axis the residue of its dilation group
// and its first token there. Mirrors `BoxPlace`.
struct BoxPlace {
  int batch;
  int head;
  PerAxis residues;
  PerAxis start;
};

// Tokens of an axis in memory: the length, rounded up to a multiple of the dilation.
GNA_HOST_DEVICE int stored_length(const Axis& axis) {
  return group_length(axis.length, axis.dilation, 0) * axis.dilation;
}

// The view of an array with this many heads: `query_heads` for query and out, `kv_heads` for key
// and value. Mirrors `TokenArray.shape`.
GNA_HOST_DEVICE TokenView token_view(const Problem& problem, int heads) {
  const Axis* axes = problem.axes;
  const int64_t token = static_cast<int64_t>(heads) * problem.head_dim;
  const int64_t row = stored_length(axes[2]) * token;
  const int64_t plane = stored_length(axes[1]) * row;
  const int64_t rows =
      static_cast<int64_t>(problem.batch) * stored_length(axes[0]) * stored_length(axes[1]);
  return {{axes[2].dilation * token, group_length(axes[2].length, axes[2].dilation, 0), rows,
           group_length(axes[1].length, axes[1].dilation, 0),
           group_length(axes[0].length, axes[0].dilation, 0)},
          {1, axes[2].dilation * token, row, axes[1].dilation * row, axes[0].dilation * plane}};
}

// Extents of a copy of a box of tokens, `columns` entries of a head at a time. In shared memory it
// holds the box's tokens row-major, `columns` entries each: row r of the operand is token digits(r,
// box).
GNA_HOST_DEVICE BoxCoordinates box_extents(const PerAxis& box, int columns) {
  return {{columns, box[2], 1, box[1], box[0]}};
}

// Coordinates of the box at `place` of an array with this many heads, from entry `column` of the
// head on. The same for loads and for the store of out: outside the view a load reads zero, and a
// store does nothing. Mirrors `TokenArray.index`.
GNA_HOST_DEVICE BoxCoordinates box_coordinates(const Problem& problem, int heads,
                                               const BoxPlace& place, int column) {
  const int plane = place.batch * stored_length(problem.axes[0]) + place.residues[0];
  const int row = plane * stored_length(problem.axes[1]) + place.residues[1];
  const int first = (place.residues[2] * heads + place.head) * problem.head_dim + column;
  return {{first, place.start[2], row, place.start[1], place.start[0]}};
}

// Tokens per axis of one of `count` parts of a tile: the parts are boxes, and consecutive rows of
// the tile. `count` is a power of two; it cuts the slowest axis into as many parts as it can, then
// the next.
GNA_HOST_DEVICE PerAxis part_shape(const PerAxis& tile, int count) {
  PerAxis part;
  GNA_UNROLL
  for (int axis = 0; axis < kMaxRank; ++axis) {
    const int cuts = minimum(count, tile[axis]);
    part[axis] = quotient(tile[axis], cuts);
    count = quotient(count, cuts);
  }
  return part;
}

// Position in its dilation group of row `row` of a Q tile, rows being the tile's tokens row-major.
// The first token of part p of `part_shape` is row p * volume(part).
GNA_HOST_DEVICE PerAxis row_position(const Problem& problem, const TileWalk& walk, int row) {
  const PerAxis place = digits(row, q_tile(problem));
  return {
      {walk.own_start[0] + place[0], walk.own_start[1] + place[1], walk.own_start[2] + place[2]}};
}

// Whether a position lies in a group of these lengths. Rows of a tile may not: their lse is not
// stored.
GNA_HOST_DEVICE bool is_real(const PerAxis& position, const PerAxis& lengths) {
  return position[0] < lengths[0] && position[1] < lengths[1] && position[2] < lengths[2];
}

// Where part `part` of the `count` parts of a job's Q tile lies in query and out. Mirrors
// `TileKernel.own_place`.
GNA_HOST_DEVICE BoxPlace query_place(const Problem& problem, const Job& job, const TileWalk& walk,
                                     int part, int count) {
  const int row = part * volume(part_shape(q_tile(problem), count));
  return {job.batch, job.head, walk.residues, row_position(problem, walk, row)};
}

// Where the KV tile at `kv_start` lies in key and value. Mirrors `TileKernel._visited_place`.
GNA_HOST_DEVICE BoxPlace key_place(const Problem& problem, const Job& job, const TileWalk& walk,
                                   const PerAxis& kv_start) {
  return {job.batch, kv_head(problem, job.head), walk.residues, kv_start};
}

// Offset in lse [B, *space, N] of the query at `position` of a dilation group; times head_dim, that
// of its row of out.
GNA_HOST_DEVICE int64_t query_offset(const Problem& problem, const Job& job,
                                     const PerAxis& residues, const PerAxis& position) {
  int64_t token = job.batch;
  GNA_UNROLL
  for (int axis = 0; axis < kMaxRank; ++axis) {
    const Axis& rule = problem.axes[axis];
    token = token * stored_length(rule) + (residues[axis] + position[axis] * rule.dilation);
  }
  return token * problem.query_heads + job.head;
}

}  // namespace gna

#endif  // GNA_BOXES_H_
