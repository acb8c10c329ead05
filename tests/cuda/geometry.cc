// The functions of `include/gna` over arrays, for `cuda_geometry_test.py`: one call of C per many
// of them.
#include <cstring>
#include <vector>

#include "gna/boxes.h"
#include "gna/masks.h"
#include "gna/tiling.h"
#include "problem_row.h"

namespace {

int32_t* write(int32_t* out, const gna::PerAxis& values) {
  for (int axis = 0; axis < gna::kMaxRank; ++axis) *out++ = values[axis];
  return out;
}

int32_t* write(int32_t* out, const gna::AxisWalk& walk) {
  const gna::CleanVisits clean = gna::clean_visits(walk);
  for (int value :
       {walk.outer.first, walk.outer.end, walk.inner.first, walk.inner.end, walk.length, walk.tile,
        walk.start, walk.num_visits, walk.full.first, walk.full.end, clean.first, clean.count}) {
    *out++ = value;
  }
  return out;
}

gna::PerAxis per_axis(const int32_t* values) { return {{values[0], values[1], values[2]}}; }

// Offset of an entry of a view in elements; -1 outside the view.
int64_t offset_of(const gna::TokenView& view, const int64_t* coordinates) {
  int64_t offset = 0;
  for (int i = 0; i < gna::kViewRank; ++i) {
    if (coordinates[i] < 0 || coordinates[i] >= view.extents[i]) return -1;
    offset += coordinates[i] * view.strides[i];
  }
  return offset;
}

// Offsets of all entries of a box in the order in which they lie in shared memory.
std::vector<int64_t> offsets_of(const gna::TokenView& view, const gna::BoxCoordinates& first,
                                const gna::BoxCoordinates& extents) {
  std::vector<int64_t> offsets;
  int64_t at[gna::kViewRank];
  for (int e = 0; e < extents.of[4]; ++e) {
    for (int d = 0; d < extents.of[3]; ++d) {
      for (int c = 0; c < extents.of[2]; ++c) {
        for (int b = 0; b < extents.of[1]; ++b) {
          for (int a = 0; a < extents.of[0]; ++a) {
            const int place[gna::kViewRank] = {a, b, c, d, e};
            for (int i = 0; i < gna::kViewRank; ++i) {
              at[i] = int64_t{first.of[i]} + place[i];
            }
            offsets.push_back(offset_of(view, at));
          }
        }
      }
    }
  }
  return offsets;
}

std::vector<uint32_t> bits_of(const gna::Problem& problem, const gna::RowKeys& row,
                              const gna::PerAxis& kv_start) {
  const int keys = gna::volume(gna::kv_tile(problem));
  std::vector<uint32_t> words((keys + gna::kWordBits - 1) / gna::kWordBits);
  for (size_t i = 0; i < words.size(); ++i) {
    words[i] = gna::row_word(problem, row, kv_start, static_cast<int>(i));
  }
  return words;
}

}  // namespace

extern "C" {

// out [n, 3]: first, end, leader.
void axis_keys(int64_t n, const int32_t* axes, const int32_t* lengths, const int32_t* queries,
               int32_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const gna::Axis axis = axis_of(axes + i * kAxisInts);
    const gna::Interval interval = gna::keys(axis, queries[i], lengths[i]);
    out[3 * i] = interval.first;
    out[3 * i + 1] = interval.end;
    out[3 * i + 2] = gna::leader(axis, queries[i], lengths[i]);
  }
}

// arguments [n, 3]: length, dilation, residue.
void group_lengths(int64_t n, const int32_t* arguments, int32_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = gna::group_length(arguments[3 * i], arguments[3 * i + 1], arguments[3 * i + 2]);
  }
}

// out [n, 12]: see `write`.
void axis_walks(int64_t n, const int32_t* axes, const int32_t* lengths, const int32_t* starts,
                int32_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    out = write(out, gna::key_walk(axis_of(axes + i * kAxisInts), lengths[i], starts[i]));
  }
}

// out [n, 47]: residues, lengths, own start, walks of the axes, num_clean, num_visits.
void tile_walks(int64_t n, const int32_t* problems, const int32_t* tiles, int32_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const gna::TileWalk walk = gna::tile_walk(problem_of(problems + i * kProblemInts), tiles[i]);
    for (const auto& values : {walk.residues, walk.lengths, walk.own_start}) {
      out = write(out, values);
    }
    for (const auto& axis : walk.axes) out = write(out, axis);
    *out++ = walk.num_clean;
    *out++ = walk.num_visits;
  }
}

// out [n, 3]: first token of these visits of these tiles.
void visits(int64_t n, const int32_t* problems, const int32_t* tiles, const int32_t* numbers,
            int32_t* out) {
  for (int64_t i = 0; i < n; ++i) {
    const gna::Problem problem = problem_of(problems + i * kProblemInts);
    out = write(out, gna::visit_start(gna::tile_walk(problem, tiles[i]), numbers[i]));
  }
}

// out [3]: tiles, jobs, whether tiles are uneven.
void counts(const int32_t* row, int64_t* out) {
  const gna::Problem problem = problem_of(row);
  out[0] = gna::num_tiles(problem);
  out[1] = gna::num_jobs(problem);
  out[2] = gna::is_uneven(problem);
}

// out [n, 3]: batch, head, tile.
void jobs(int64_t n, const int32_t* row, const int64_t* numbers, int32_t* out) {
  const gna::Problem problem = problem_of(row);
  for (int64_t i = 0; i < n; ++i) {
    const gna::Job job = gna::job(problem, numbers[i]);
    *out++ = job.batch;
    *out++ = job.head;
    *out++ = job.tile;
  }
}

// Offsets in elements, -1 where nothing is, of a box of `heads` heads. place [8]: batch, head,
// residues, start.
void box_offsets(const int32_t* row, int32_t heads, const int32_t* place, const int32_t* box,
                 int32_t column, int32_t columns, int64_t* out) {
  const gna::Problem problem = problem_of(row);
  const gna::BoxPlace at{place[0], place[1], per_axis(place + 2), per_axis(place + 5)};
  const auto offsets =
      offsets_of(gna::token_view(problem, heads), gna::box_coordinates(problem, heads, at, column),
                 gna::box_extents(per_axis(box), columns));
  std::memcpy(out, offsets.data(), offsets.size() * sizeof(int64_t));
}

// Where a job's rows go. out [rows, 3]: offset of the row's lse, and of its first entry of out by
// the box of its part, for a real row; -1, -1 for others; then whether it is real.
void row_offsets(const int32_t* row, int64_t number, int32_t parts, int64_t* out) {
  const gna::Problem problem = problem_of(row);
  const gna::Job job = gna::job(problem, number);
  const gna::TileWalk walk = gna::tile_walk(problem, job.tile);
  const gna::PerAxis box = gna::part_shape(gna::q_tile(problem), parts);
  const gna::TokenView view = gna::token_view(problem, problem.query_heads);
  for (int part = 0; part < parts; ++part) {
    const gna::BoxPlace place = gna::query_place(problem, job, walk, part, parts);
    const auto offsets =
        offsets_of(view, gna::box_coordinates(problem, problem.query_heads, place, 0),
                   gna::box_extents(box, 1));
    for (size_t i = 0; i < offsets.size(); ++i) {
      const int tile_row = part * gna::volume(box) + static_cast<int>(i);
      const gna::PerAxis position = gna::row_position(problem, walk, tile_row);
      const bool is_real = gna::is_real(position, walk.lengths);
      *out++ = is_real ? gna::query_offset(problem, job, walk.residues, position) : -1;
      *out++ = is_real ? offsets[i] : -1;
      *out++ = is_real;
    }
  }
}

// Walks all tiles of one head, and counts how often each query meets each key where the kernels let
// it: all keys of a clean visit, and those whose bits are set. counts [tokens, tokens] of tokens in
// memory; strays: meetings with keys that are not there. Returns how many visits were clean.
int64_t meetings(const int32_t* row, int64_t tokens, uint8_t* counts, int64_t* strays) {
  const gna::Problem problem = problem_of(row);
  const gna::PerAxis kv_box = gna::kv_tile(problem);
  const gna::TokenView view = gna::token_view(problem, 1);
  const int rows = gna::volume(gna::q_tile(problem)), columns = gna::volume(kv_box);
  int64_t clean = 0;
  *strays = 0;
  for (int tile = 0; tile < gna::num_tiles(problem); ++tile) {
    const gna::Job job{0, 0, tile};
    const gna::TileWalk walk = gna::tile_walk(problem, tile);
    clean += walk.num_clean;
    for (int visit = 0; visit < walk.num_visits; ++visit) {
      const gna::PerAxis start = gna::visit_start(walk, visit);
      const gna::BoxPlace place = gna::key_place(problem, job, walk, start);
      const auto keys =
          offsets_of(view, gna::box_coordinates(problem, 1, place, 0), gna::box_extents(kv_box, 1));
      for (int r = 0; r < rows; ++r) {
        const gna::PerAxis position = gna::row_position(problem, walk, r);
        if (!gna::is_real(position, walk.lengths)) continue;
        const gna::RowKeys seen = gna::row_keys(problem, position, walk.lengths);
        const auto words = bits_of(problem, seen, start);
        const int64_t query = gna::query_offset(problem, job, walk.residues, position);
        for (int c = 0; c < columns; ++c) {
          const bool bit = (words[c / gna::kWordBits] >> (c % gna::kWordBits)) & 1;
          // A clean visit needs no bits: they are all set.
          if (visit < walk.num_clean && !bit) ++*strays;
          if (!bit) continue;
          if (keys[c] < 0) {
            ++*strays;
          } else {
            ++counts[query * tokens + keys[c]];
          }
        }
      }
    }
  }
  return clean;
}

}  // extern "C"
