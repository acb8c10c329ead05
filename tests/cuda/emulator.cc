// The loop of the CUDA kernels over tiles, on the host, for `cuda_emulator_test.py`: boxes from
// memory, scores, mask, online softmax, weighted values, stores. All arithmetic is in float, but
// weights are rounded where the kernel's operands have 8 bits, and nothing is asynchronous.
//
// As in the kernels, every index comes from `include/gna`; this file adds only the faults that the
// test plants in them, one per build with -DFAULT=..., and what a tensor copy does with its
// coordinates.
#include <cmath>
#include <limits>
#include <vector>

#include "gna/boxes.h"
#include "gna/masks.h"
#include "gna/tiling.h"
#include "problem_row.h"

#define NONE 0
#define VISIT 1
#define BOX 2
#define BITS 3
#define STORE 4
#define LSE 5
#ifndef FAULT
#define FAULT NONE
#endif

namespace {

// Where a fault is planted: 1 in a build with this fault, or 0.
constexpr int off_by(int fault) { return fault == FAULT ? 1 : 0; }

gna::PerAxis faulty_visit(const gna::TileWalk& walk, int visit) {
  // Past the last visit comes, where none is clean, the first again: no fault at all.
  const bool is_last = visit + 1 >= walk.num_visits;
  return gna::visit_start(walk, is_last ? visit : visit + off_by(VISIT));
}

gna::BoxCoordinates faulty_box(const gna::Problem& problem, const gna::BoxPlace& place,
                               int column) {
  gna::BoxCoordinates at = gna::box_coordinates(problem, problem.kv_heads, place, column);
  at.of[gna::kViewRank - 1] += off_by(BOX);
  return at;
}

uint32_t faulty_word(const gna::Problem& problem, const gna::RowKeys& row,
                     const gna::PerAxis& kv_start, int word) {
  return gna::row_word(problem, row, kv_start, word) >> off_by(BITS);
}

gna::BoxCoordinates faulty_store(const gna::Problem& problem, const gna::BoxPlace& place,
                                 int column) {
  gna::BoxCoordinates at = gna::box_coordinates(problem, problem.query_heads, place, column);
  at.of[gna::kViewRank - 1] += off_by(STORE);
  return at;
}

int64_t faulty_offset(const gna::Problem& problem, const gna::Job& job, const gna::TileWalk& walk,
                      const gna::PerAxis& position) {
  return gna::query_offset(problem, job, walk.residues, position) + off_by(LSE);
}

// Calls `move(offset in memory, offset in the box)` for every entry of a box that lies inside the
// view.
template <typename Move>
void copy_box(const gna::TokenView& view, const gna::BoxCoordinates& first,
              const gna::BoxCoordinates& extents, const Move& move) {
  int64_t entries = 1;
  for (int size : extents.of) entries *= size;
  for (int64_t entry = 0; entry < entries; ++entry) {
    int64_t rest = entry, offset = 0;
    bool is_inside = true;
    for (int i = 0; i < gna::kViewRank; ++i) {
      const int64_t at = first.of[i] + rest % extents.of[i];
      rest /= extents.of[i];
      is_inside = is_inside && at >= 0 && at < view.extents[i];
      offset += at * view.strides[i];
    }
    if (is_inside) move(offset, entry);
  }
}

// Entries of a head that one copy moves, where head_dim is a multiple of it; else all of them.
constexpr int kChunk = 4;

int chunk_of(const gna::Problem& problem) {
  return problem.head_dim % kChunk == 0 ? kChunk : problem.head_dim;
}

// A box of one head, [tokens, head_dim], chunk by chunk; `coordinates(column)` is where a chunk
// begins. What lies outside the view reads as zero.
template <typename Coordinates>
std::vector<float> load(const gna::Problem& problem, const float* array, const gna::TokenView& view,
                        const gna::PerAxis& box, const Coordinates& coordinates) {
  std::vector<float> tokens(gna::volume(box) * problem.head_dim, 0.0f);
  const int chunk = chunk_of(problem);
  for (int column = 0; column < problem.head_dim; column += chunk) {
    copy_box(view, coordinates(column), gna::box_extents(box, chunk),
             [&](int64_t from, int64_t to) {
               tokens[to / chunk * problem.head_dim + column + to % chunk] = array[from];
             });
  }
  return tokens;
}

// One row of a Q tile: its softmax so far.
struct Row {
  gna::PerAxis position;
  gna::RowKeys keys;
  float largest = -std::numeric_limits<float>::infinity();
  float total = 0.0f;
  std::vector<float> out;
};

constexpr float kLog2E = 1.44269504f;

// A weight, 0 to 1, as float8_e4m3fn: 4 bits from 2^-6 on, and below that multiples of 2^-9.
float rounded_to_float8(float weight) {
  const float step = std::exp2(std::fmax(std::floor(std::log2(weight)), -6.0f) - 3.0f);
  return std::nearbyint(weight / step) * step;
}

// Adds one tile of keys and values [keys, head_dim] to a row; `bits` is null where no mask is
// needed.
void attend(const gna::Problem& problem, Row& row, const float* query, const float* key,
            const float* value, int num_keys, const uint32_t* bits, bool is_float8) {
  const int head_dim = problem.head_dim;
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> scores(num_keys);
  float largest = row.largest;
  for (int k = 0; k < num_keys; ++k) {
    float sum = 0.0f;
    for (int h = 0; h < head_dim; ++h) sum += query[h] * key[k * head_dim + h];
    const bool is_seen =
        bits == nullptr || ((bits[k / gna::kWordBits] >> (k % gna::kWordBits)) & 1) != 0;
    scores[k] = is_seen ? sum * (problem.scale * kLog2E) : -infinity;
    largest = std::fmax(largest, scores[k]);
  }
  // No key seen yet: nothing to weigh, and -inf - -inf is no number.
  if (largest == -infinity) return;
  const float decay = std::exp2(row.largest - largest);
  row.total *= decay;
  for (float& entry : row.out) entry *= decay;
  for (int k = 0; k < num_keys; ++k) {
    const float weight = std::exp2(scores[k] - largest);
    // The sum is of weights as they were computed.
    row.total += weight;
    const float factor = is_float8 ? rounded_to_float8(weight) : weight;
    for (int h = 0; h < head_dim; ++h) row.out[h] += factor * value[k * head_dim + h];
  }
  row.largest = largest;
}

struct Arrays {
  const float* query;
  const float* key;
  const float* value;
  float* out;
  float* lse;
  // Whether operands are float8_e4m3fn, and so weights.
  bool is_float8;
};

// One part of a Q tile: its rows from the first visit to the store.
void run_part(const gna::Problem& problem, const gna::Job& job, const gna::TileWalk& walk, int part,
              int parts, const Arrays& arrays) {
  const gna::PerAxis box = gna::part_shape(gna::q_tile(problem), parts), kv_box = kv_tile(problem);
  const gna::TokenView queries = gna::token_view(problem, problem.query_heads);
  const gna::TokenView keys = gna::token_view(problem, problem.kv_heads);
  const gna::BoxPlace own = gna::query_place(problem, job, walk, part, parts);
  const int num_rows = gna::volume(box), num_keys = gna::volume(kv_box);
  const int head_dim = problem.head_dim;
  const auto query = load(problem, arrays.query, queries, box, [&](int column) {
    return gna::box_coordinates(problem, problem.query_heads, own, column);
  });
  std::vector<Row> rows(num_rows);
  for (int r = 0; r < num_rows; ++r) {
    rows[r].position = gna::row_position(problem, walk, part * num_rows + r);
    rows[r].keys = gna::row_keys(problem, rows[r].position, walk.lengths);
    rows[r].out.assign(head_dim, 0.0f);
  }
  std::vector<uint32_t> bits((num_keys + gna::kWordBits - 1) / gna::kWordBits);
  // Kernels visit something even for a tile without tokens, of which they store nothing real.
  for (int visit = 0; visit < gna::maximum(walk.num_visits, 1); ++visit) {
    const gna::PerAxis start = faulty_visit(walk, visit);
    const gna::BoxPlace visited = gna::key_place(problem, job, walk, start);
    const auto at = [&](int column) { return faulty_box(problem, visited, column); };
    const auto key = load(problem, arrays.key, keys, kv_box, at);
    const auto value = load(problem, arrays.value, keys, kv_box, at);
    const bool is_masked = visit >= walk.num_clean;
    for (int r = 0; r < num_rows; ++r) {
      for (size_t word = 0; is_masked && word < bits.size(); ++word) {
        bits[word] = faulty_word(problem, rows[r].keys, start, static_cast<int>(word));
      }
      attend(problem, rows[r], query.data() + r * head_dim, key.data(), value.data(), num_keys,
             is_masked ? bits.data() : nullptr, arrays.is_float8);
    }
  }
  const int chunk = chunk_of(problem);
  for (int column = 0; column < head_dim; column += chunk) {
    copy_box(queries, faulty_store(problem, own, column), gna::box_extents(box, chunk),
             [&](int64_t to, int64_t from) {
               const Row& row = rows[from / chunk];
               arrays.out[to] = row.out[column + from % chunk] / row.total;
             });
  }
  for (const Row& row : rows) {
    if (!gna::is_real(row.position, walk.lengths)) continue;
    arrays.lse[faulty_offset(problem, job, walk, row.position)] =
        (row.largest + std::log2(row.total)) / kLog2E;
  }
}

}  // namespace

// The forward of query [B, *space, N, H], key, value [B, *space, K, H] in memory as `gna/boxes.h`
// wants it. `lse` has room for one entry more than [B, *space, N]. Every Q tile is done in `parts`
// parts, as by the warps of a kernel.
extern "C" void forward(const int32_t* problem_row, float scale, int32_t parts, int32_t is_float8,
                        const float* query, const float* key, const float* value, float* out,
                        float* lse) {
  gna::Problem problem = problem_of(problem_row);
  problem.scale = scale;
  for (int64_t number = 0; number < gna::num_jobs(problem); ++number) {
    const gna::Job job = gna::job(problem, number);
    const gna::TileWalk walk = gna::tile_walk(problem, job.tile);
    for (int part = 0; part < parts; ++part) {
      run_part(problem, job, walk, part, parts, {query, key, value, out, lse, is_float8 != 0});
    }
  }
}
