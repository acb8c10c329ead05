// The call that a kernel serves, as plain data, all of it known at run time only.
//
// Mirrors `gna_jax.problem.Problem` and `gna_jax.neighborhood.AxisNeighborhood`. A `Problem` is
// passed to kernels by value and is valid already: arguments are checked where they are decoded.
// Which keys a query sees: `neighborhood.h`. Which tiles are read: `tiling.h`. Everything in this
// directory is integer arithmetic on the host as on the device, and needs no CUDA header.
#ifndef GNA_PROBLEM_H_
#define GNA_PROBLEM_H_

#include <cstdint>

#if defined(__CUDACC__)
#define GNA_HOST_DEVICE __host__ __device__ __forceinline__
// Arrays of one entry per axis stay in registers only where every index is a constant.
#define GNA_UNROLL _Pragma("unroll")
#else
#define GNA_HOST_DEVICE inline
#define GNA_UNROLL
#endif

namespace gna {

// Spatial axes of every problem; those past its rank hold one token.
constexpr int kMaxRank = 3;

// One int per axis, from the slowest axis to the fastest: sizes, positions or residues.
struct PerAxis {
  int of[kMaxRank];

  GNA_HOST_DEVICE int& operator[](int axis) { return of[axis]; }
  GNA_HOST_DEVICE int operator[](int axis) const { return of[axis]; }
};

// One spatial axis: the rule of `AxisNeighborhood`, and how the axis is cut into tiles. As it is by
// default, an axis past the rank.
struct Axis {
  // Tokens of the whole axis, of all its dilation groups together: at most 2^30, so that two
  // positions add up in 32 bits.
  int length = 1;
  // Keys of a window, counted in one dilation group. Never -1: a window of the whole group is
  // ceil(length / dilation), the length of the longest group; `keys` takes the smaller of window
  // and group, so shorter groups are seen whole as well.
  int window = 1;
  // Queries that share a window, 1 <= stride <= window.
  int stride = 1;
  // Tokens of a dilation group lie this far apart; 1: there is one group.
  int dilation = 1;
  bool is_causal = false;
  // Queries of a Q tile and keys of a KV tile on this axis: powers of two, at most 256 (a TMA box).
  int q_tile = 1;
  int kv_tile = 1;
};

// Attention of query, out [B, *space, N, H] with key, value [B, *space, K, H]; lse [B, *space, N]
// float32, natural logarithm.
//
// In memory an axis that its dilation does not divide is rounded up, in every array: see `boxes.h`.
// The layout's axes come first in `axes`. Those from `rank` on keep their defaults, so all code is
// of rank 3: [B, X, N, H] and [B, X, 1, 1, N, H] are the same memory.
struct Problem {
  int rank = 1;
  Axis axes[kMaxRank];
  int batch = 1;
  int query_heads = 1;
  // Divides query_heads.
  int kv_heads = 1;
  int head_dim = 1;
  // Factor of the scores.
  float scale = 1.0f;
};

// Tokens per axis of a Q tile.
GNA_HOST_DEVICE PerAxis q_tile(const Problem& problem) {
  return {{problem.axes[0].q_tile, problem.axes[1].q_tile, problem.axes[2].q_tile}};
}

// Tokens per axis of a KV tile.
GNA_HOST_DEVICE PerAxis kv_tile(const Problem& problem) {
  return {{problem.axes[0].kv_tile, problem.axes[1].kv_tile, problem.axes[2].kv_tile}};
}

// Head of key and value that query head `head` reads: `head // Problem.heads_per_kv`.
GNA_HOST_DEVICE int kv_head(const Problem& problem, int head) {
  return head / (problem.query_heads / problem.kv_heads);
}

// The larger and the smaller of two.
GNA_HOST_DEVICE int maximum(int a, int b) { return a > b ? a : b; }
GNA_HOST_DEVICE int minimum(int a, int b) { return a < b ? a : b; }

// number / divisor of numbers that are not negative: unsigned division takes fewer instructions.
GNA_HOST_DEVICE int quotient(int number, int divisor) {
  return static_cast<int>(static_cast<uint32_t>(number) / static_cast<uint32_t>(divisor));
}

// ceil(number / divisor) of numbers that are not negative.
GNA_HOST_DEVICE int ceil_quotient(int number, int divisor) {
  return quotient(number + divisor - 1, divisor);
}

// Entries of a box: the product of its sizes.
GNA_HOST_DEVICE int volume(const PerAxis& sizes) { return sizes[0] * sizes[1] * sizes[2]; }

// Row-major place of entry `number` in a box of these sizes. Mirrors `pallas_kernels.plan._digits`.
GNA_HOST_DEVICE PerAxis digits(int number, const PerAxis& sizes) {
  const int slower = quotient(number, sizes[2]);
  const int slowest = quotient(slower, sizes[1]);
  return {{slowest, slower - slowest * sizes[1], number - slower * sizes[2]}};
}

}  // namespace gna

#endif  // GNA_PROBLEM_H_
