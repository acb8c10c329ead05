// What a row of a Q tile sees of a KV tile, one bit per key: the mirror of
// `pallas_kernels/masks.py`.
//
// A row's keys are an interval per axis, computed once per Q tile. For a KV tile they become bits,
// the key's row-major number in the tile being the bit's: per axis the bits of the rows, planes or
// columns that the row sees, and of those the intersection. After that a key costs one instruction,
// whatever the number of axes. Only visits from `TileWalk::num_clean` on need it.
#ifndef GNA_MASKS_H_
#define GNA_MASKS_H_

#include "neighborhood.h"

namespace gna {

// Keys per word of bits.
constexpr int kWordBits = 32;

// Keys that a row sees, per axis, in positions of its dilation group.
struct RowKeys {
  Interval axes[kMaxRank];
};

// What the query at `position` sees in a dilation group of these lengths. Rows past the group's end
// are nobody's: they may see anything, but always something. Mirrors `masks.key_intervals`.
GNA_HOST_DEVICE RowKeys row_keys(const Problem& problem, const PerAxis& position,
                                 const PerAxis& lengths) {
  RowKeys row;
  GNA_UNROLL
  for (int axis = 0; axis < kMaxRank; ++axis) {
    row.axes[axis] = keys(problem.axes[axis], position[axis], lengths[axis]);
  }
  return row;
}

// Bits `count` and up, 0 to 32. As 64 bits: a shift by all of a word's bits is undefined.
GNA_HOST_DEVICE uint32_t bits_from(int count) {
  return static_cast<uint32_t>(~uint64_t{0} << count);
}

// 1 and its copies every `period` bits: what a pattern of `period` bits, a power of two, is
// multiplied by to fill a word.
GNA_HOST_DEVICE uint32_t copies_every(int period) {
  uint32_t copies = 1;
  GNA_UNROLL
  for (int step = 1; step < kWordBits; step *= 2) copies |= step >= period ? copies << step : 0;
  return copies;
}

// Bit b of word `word`: does the row see key number 32 * word + b of the KV tile at `kv_start`?
// Bits past a tile of fewer keys mean nothing. Mirrors one word of `masks.words`.
//
// Where kernels look bits up by constants, words stay in registers and a look-up is one
// instruction.
GNA_HOST_DEVICE uint32_t row_word(const Problem& problem, const RowKeys& row,
                                  const PerAxis& kv_start, int word) {
  const PerAxis box = kv_tile(problem);
  uint32_t bits = ~uint32_t{0};
  // Row-major, `run` keys in a row share their place on the axis, and places begin anew after
  // `period` keys.
  int run = 1;
  GNA_UNROLL
  for (int axis = kMaxRank - 1; axis >= 0; --axis) {
    const int period = run * box[axis];
    const Interval& keys = row.axes[axis];
    // Seen are keys [low, high) of every period. Bounded before it is multiplied, a distance cannot
    // overflow.
    const int low = minimum(maximum(keys.first - kv_start[axis], 0), box[axis]) * run;
    const int high = minimum(maximum(keys.end - kv_start[axis], 0), box[axis]) * run;
    const int first = (word * kWordBits) & (period - 1);
    const uint32_t pattern = bits_from(minimum(maximum(low - first, 0), kWordBits)) &
                             ~bits_from(minimum(maximum(high - first, 0), kWordBits));
    bits &= pattern * copies_every(period);
    run = period;
  }
  return bits;
}

}  // namespace gna

#endif  // GNA_MASKS_H_
