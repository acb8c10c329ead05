// Which tiles a thread block works on and reads, in closed form: the mirror of
// `gna_jax.tiling.key_walk` and of `pallas_kernels/plan.py` (the forward's plan: an own Q tile,
// visited KV tiles).
//
// Nothing is tabulated. A job number gives batch entry, head and tile; a tile's number gives its
// place and its walk; a visit's number gives the first token of the KV tile. Visits without a mask
// come first, then the shell around them. Where tiles lie in memory: `boxes.h`. What a row of a
// tile sees: `masks.h`.
#ifndef GNA_TILING_H_
#define GNA_TILING_H_

#include "neighborhood.h"

namespace gna {

// The KV tiles that a Q tile visits on one axis: tile number n holds the keys start + n * tile +
// [0, tile). Mirrors `AxisWalk`.
struct AxisWalk {
  // Keys that some query of the tile sees: these are read.
  Interval outer;
  // Keys that all its queries see: these need no mask; maybe none.
  Interval inner;
  // Tokens of the dilation group.
  int length;
  // Keys per visited tile.
  int tile;
  // First key of the first visited tile: tiles start where the outer keys do.
  int start;
  int num_visits;
  // Numbers of the visited tiles without a masked pair of real tokens; first <= end.
  Interval full;
};

// The visits on one axis that need no mask, [first, first + count): full, and every key is real.
struct CleanVisits {
  int first;
  int count;
};

// One Q tile: its dilation group, its first token and the KV tiles it visits. Mirrors `TileWalk`.
struct TileWalk {
  // The dilation group, and its tokens per axis.
  PerAxis residues;
  PerAxis lengths;
  // First query; past the end of a group that is shorter than the longest, where there is no work.
  PerAxis own_start;
  AxisWalk axes[kMaxRank];
  // The first visits need no mask: all keys are real, and every query sees them.
  int num_clean;
  // All visits; 0 for a tile without tokens.
  int num_visits;
};

// What a thread block does at a time: one tile of one head of one batch entry.
struct Job {
  int batch;
  // Query head.
  int head;
  // Number of the tile among `num_tiles`.
  int tile;
};

// The walk of the Q tile q_start + [0, axis.q_tile), 0 <= q_start < length, over KV tiles on one
// axis. Mirrors `tiling.key_walk` with dynamic=True: with first query q0 and last real query q1,
// outer = [keys(q0).first, keys(q1).end), inner = [keys(q1).first, keys(q0).end).
GNA_HOST_DEVICE AxisWalk key_walk(const Axis& axis, int length, int q_start) {
  const Interval low = keys(axis, q_start, length);
  const Interval high = keys(axis, minimum(q_start + axis.q_tile, length) - 1, length);
  AxisWalk walk;
  walk.outer = {low.first, high.end};
  walk.inner = {high.first, low.end};
  walk.length = length;
  walk.tile = axis.kv_tile;
  walk.start = low.first;
  walk.num_visits = ceil_quotient(high.end - low.first, axis.kv_tile);
  const int first = ceil_quotient(high.first - low.first, axis.kv_tile);
  // An inner interval up to the group's end fills the last tile too: what sticks out there is
  // padding.
  const int end = low.end >= length ? walk.num_visits : quotient(low.end - low.first, axis.kv_tile);
  walk.full = {first, maximum(first, end)};
  return walk;
}

// Visits of an axis that are full and hold no padding: of `walk.full`, those up to (length - start)
// / tile. Mirrors `plan.clean_visits`.
GNA_HOST_DEVICE CleanVisits clean_visits(const AxisWalk& walk) {
  const int whole = quotient(walk.length - walk.start, walk.tile);
  return {walk.full.first, maximum(minimum(walk.full.end, whole) - walk.full.first, 0)};
}

// Q tiles per axis of the longest dilation group: ceil(group_length(length, dilation, 0) / q_tile).
// Mirrors `TilePlan.tiles`.
GNA_HOST_DEVICE PerAxis tiles(const Problem& problem) {
  PerAxis count;
  GNA_UNROLL
  for (int axis = 0; axis < kMaxRank; ++axis) {
    const Axis& rule = problem.axes[axis];
    count[axis] = ceil_quotient(group_length(rule.length, rule.dilation, 0), rule.q_tile);
  }
  return count;
}

// Q tiles of all dilation groups of one head. Mirrors `TilePlan.num_tiles`.
GNA_HOST_DEVICE int num_tiles(const Problem& problem) {
  const PerAxis dilation{
      {problem.axes[0].dilation, problem.axes[1].dilation, problem.axes[2].dilation}};
  return volume(tiles(problem)) * volume(dilation);
}

// The walk of Q tile number `tile`: dilation groups row-major, tiles of a group row-major; on a
// causal axis from the last tile on, since later queries see more keys and the heaviest work shall
// start first. Mirrors `plan.tile_walk`.
GNA_HOST_DEVICE TileWalk tile_walk(const Problem& problem, int tile) {
  const PerAxis dilation{
      {problem.axes[0].dilation, problem.axes[1].dilation, problem.axes[2].dilation}};
  const PerAxis count = tiles(problem);
  const int group = quotient(tile, volume(count));
  PerAxis place = digits(tile - group * volume(count), count);
  TileWalk walk;
  walk.residues = digits(group, dilation);
  walk.num_clean = walk.num_visits = 1;
  bool is_empty = false;
  GNA_UNROLL
  for (int axis = 0; axis < kMaxRank; ++axis) {
    const Axis& rule = problem.axes[axis];
    const int length = group_length(rule.length, rule.dilation, walk.residues[axis]);
    const int number = rule.is_causal ? count[axis] - 1 - place[axis] : place[axis];
    const int start = number * rule.q_tile;
    walk.lengths[axis] = length;
    walk.own_start[axis] = start;
    walk.axes[axis] = key_walk(rule, length, minimum(start, length - 1));
    walk.num_clean *= clean_visits(walk.axes[axis]).count;
    walk.num_visits *= walk.axes[axis].num_visits;
    is_empty = is_empty || start >= length;
  }
  if (is_empty) walk.num_clean = walk.num_visits = 0;
  return walk;
}

// Numbers per axis of clean visit `step`, row-major in the box of clean visits. Mirrors
// `TileWalk.clean_tile`.
GNA_HOST_DEVICE PerAxis clean_digits(const TileWalk& walk, int step) {
  PerAxis first, count;
  GNA_UNROLL
  for (int axis = 0; axis < kMaxRank; ++axis) {
    const CleanVisits clean = clean_visits(walk.axes[axis]);
    first[axis] = clean.first;
    count[axis] = clean.count;
  }
  const PerAxis place = digits(step, count);
  return {{first[0] + place[0], first[1] + place[1], first[2] + place[2]}};
}

// Numbers per axis of shell visit `step`: the box of all visits without the box of the clean ones.
// Slices of the slowest axis outside its clean range come first, whole; then those inside it, each
// with the shell of the remaining axes. Mirrors `plan._shell_digits`.
GNA_HOST_DEVICE PerAxis shell_digits(const TileWalk& walk, int step) {
  PerAxis place;
  // Whether a slower axis lies outside its clean range: then every visit of the others belongs to
  // the shell.
  bool is_whole = false;
  GNA_UNROLL
  for (int axis = 0; axis < kMaxRank; ++axis) {
    // Visits of the faster axes, and the clean ones among them.
    int in_slice = 1, clean_in_slice = 1;
    GNA_UNROLL
    for (int faster = axis + 1; faster < kMaxRank; ++faster) {
      in_slice *= walk.axes[faster].num_visits;
      clean_in_slice *= clean_visits(walk.axes[faster]).count;
    }
    const CleanVisits clean = clean_visits(walk.axes[axis]);
    const int outside = (walk.axes[axis].num_visits - clean.count) * in_slice;
    const bool is_outside = is_whole || step < outside;
    const int rest = is_outside ? step : step - outside;
    const int slice = is_outside ? in_slice : maximum(in_slice - clean_in_slice, 1);
    const int number = quotient(rest, slice);
    step = rest - number * slice;
    const int skipped = is_whole || (is_outside && number < clean.first) ? 0
                        : is_outside                                     ? clean.count
                                                                         : clean.first;
    place[axis] = number + skipped;
    is_whole = is_outside;
  }
  return place;
}

// First token of the KV tile of visit `visit` of 0 .. num_visits - 1: the clean visits, then the
// shell. Mirrors `TileWalk.clean_tile(visit)` and `TileWalk.shell_tile(visit - num_clean)`.
GNA_HOST_DEVICE PerAxis visit_start(const TileWalk& walk, int visit) {
  const PerAxis place = visit < walk.num_clean ? clean_digits(walk, visit)
                                               : shell_digits(walk, visit - walk.num_clean);
  PerAxis start;
  GNA_UNROLL
  for (int axis = 0; axis < kMaxRank; ++axis) {
    start[axis] = walk.axes[axis].start + place[axis] * walk.axes[axis].tile;
  }
  return start;
}

// Whether tiles differ much in work. Mirrors `TilePlan.is_uneven`.
GNA_HOST_DEVICE bool is_uneven(const Problem& problem) {
  return problem.axes[0].is_causal || problem.axes[1].is_causal || problem.axes[2].is_causal;
}

// Jobs of the whole problem: batch * query_heads * num_tiles.
GNA_HOST_DEVICE int64_t num_jobs(const Problem& problem) {
  return static_cast<int64_t>(problem.batch) * problem.query_heads * num_tiles(problem);
}

// Job `number` of 0 .. num_jobs - 1. Tiles of one head, which share keys, are neighbours; where
// tiles differ much in work, those of all heads come before the next, lighter tile. Mirrors the
// grid of `pallas_kernels.calls`.
GNA_HOST_DEVICE Job job(const Problem& problem, int64_t number) {
  const int count = num_tiles(problem);
  const int heads = problem.query_heads;
  if (is_uneven(problem)) {
    const int tile = static_cast<int>(number / (static_cast<int64_t>(problem.batch) * heads));
    const int head = static_cast<int>(number - static_cast<int64_t>(tile) * problem.batch * heads);
    return {head / heads, head % heads, tile};
  }
  const int head = static_cast<int>(number / count);
  return {head / heads, head % heads,
          static_cast<int>(number - static_cast<int64_t>(head) * count)};
}

}  // namespace gna

#endif  // GNA_TILING_H_
