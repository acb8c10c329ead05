// The forward on Blackwell: CUTLASS's example 77 with other tiles, other masks and another way to
// and from memory.
//
// What stays the example's: roles of warps, pipelines, tensor memory, both products, the online
// softmax and its correction, the scheduler of jobs. What is ours hides a member of the example's
// collectives: `Mainloop` loads boxes of tokens and tells the others what they visit and see,
// `ShellMask` masks rows, `LseRows` places lse, `Epilogue` stores out. Coordinates, visits and
// masks come from `gna/`.
#ifndef GNA_KERNELS_SM100_FORWARD_H_
#define GNA_KERNELS_SM100_FORWARD_H_

#include <cmath>
#include <cstddef>

#include "box_copy.h"
#include "collective/fmha_common.hpp"
#include "collective/fmha_fusion.hpp"
#include "collective/sm100_fmha_fwd_mainloop_tma_warpspecialized.hpp"
#include "gna/masks.h"
#include "kernel/fmha_tile_scheduler.hpp"
#include "kernel/sm100_fmha_fwd_kernel_tma_warpspecialized.hpp"
#include "launch.h"
#include "warp_visits.h"

namespace gna::sm100 {

// Two warpgroups share a Q tile, one part of 128 rows each, a row per thread.
constexpr int kParts = 2;
constexpr int kPartRows = 128;
constexpr int kTileRows = kParts * kPartRows;
constexpr int kKeys = 128;

template <int kHeadDim>
using TileShape = cute::Shape<cute::Int<kTileRows>, cute::Int<kKeys>, cute::Int<kHeadDim>>;
using Stride = cute::tuple<int, cute::_1, cute::tuple<cute::tuple<int, int>, int>>;
// Queries, keys, head dim, ((heads per kv head, kv heads), batch), as the example's kernel wants
// it: here one long row of jobs, kTileRows queries each.
using JobsShape = cute::tuple<int, int, int, cute::tuple<cute::tuple<int, int>, int>>;

// A tile as one thread of a softmax warpgroup sees it.
struct ThreadTile {
  const Problem& problem;
  int num_visits;
  int num_clean;
  RowKeys row;
  // The example passes tiles on as constants.
  mutable WarpVisits visits;
};

// What the example's correction reads of a problem's shape (queries, keys, head dim, heads and
// batch): the number of queries, and here of visits.
using WalkShape =
    cute::tuple<int, TileWalk, int, cute::tuple<cute::tuple<cute::_1, cute::_1>, cute::_1>>;

// The visits and masks of a tile, in the terms of the example's masks.
struct ShellMask {
  template <class Coord, class Tile>
  CUTLASS_DEVICE int get_trip_count(const Coord&, const Tile&, const TileWalk& walk) {
    return num_visits(walk);
  }

  template <class Coord, class Tile>
  CUTLASS_DEVICE int get_trip_count(const Coord&, const Tile&, const WalkShape& shape) {
    return num_visits(cute::get<1>(shape));
  }

  template <class Coord, class Tile>
  CUTLASS_DEVICE int get_unmasked_trip_count(const Coord&, const Tile&, const ThreadTile& tile) {
    return tile.num_clean;
  }

  template <class Coord, class Tile>
  CUTLASS_DEVICE int get_masked_trip_count(const Coord&, const Tile&, const ThreadTile& tile) {
    return tile.num_visits - tile.num_clean;
  }

  // Hides the scores of unseen keys. A score's place is its row, and kKeys * visit + key.
  template <class Scores, class Places>
  CUTLASS_DEVICE void apply_mask(Scores& scores, const Places& places, const ThreadTile& tile) {
    using namespace cute;
    // Scores of a thread: its row.
    CUTE_STATIC_ASSERT_V(size(scores) == Int<kKeys>{});
    CUTE_STATIC_ASSERT_V(places.layout()(Int<1>{}) == make_coord(_0{}, _1{}));
    CUTE_STATIC_ASSERT_V(places.layout()(Int<kKeys / 2>{}) == make_coord(_0{}, Int<kKeys / 2>{}));
    CUTE_STATIC_ASSERT_V(places.layout()(Int<kKeys - 1>{}) == make_coord(_0{}, Int<kKeys - 1>{}));
    const PerAxis start = tile.visits.start(get<1>(places(_0{})) / kKeys);
    CUTLASS_PRAGMA_UNROLL
    for (int word = 0; word < kKeys / kWordBits; ++word) {
      const uint32_t bits = row_word(tile.problem, tile.row, start, word);
      CUTLASS_PRAGMA_UNROLL
      for (int bit = 0; bit < kWordBits; ++bit) {
        float& score = scores(word * kWordBits + bit);
        score = (bits >> bit) & 1 ? score : -INFINITY;
      }
    }
  }
};

// What the example's correction takes for memory of lse, one place per row of a job's tile: it
// writes to the row's place in [B, *space, N] if the row is real. Rows count through all jobs.
struct LseRows {
  struct Row {
    const LseRows& rows;
    int number;

    CUTLASS_DEVICE void operator=(float lse) const {
      const PerAxis position = row_position(rows.problem, rows.walk, number);
      if (!is_real(position, rows.walk.lengths)) return;
      rows.memory[query_offset(rows.problem, rows.job, rows.walk.residues, position)] = lse;
    }
  };
  using reference = Row;
  using element_type = float;
  using value_type = float;

  const Problem& problem;
  const Job& job;
  const TileWalk& walk;
  float* memory;

  CUTLASS_DEVICE Row operator*() const { return (*this)[0]; }
  CUTLASS_DEVICE Row operator[](int row) const { return {*this, row % kTileRows}; }
  CUTLASS_DEVICE friend bool operator!=(const LseRows&, std::nullptr_t) { return true; }
};

// What it reads of an epilogue: the memory of lse with its strides.
struct LseEpilogue {
  struct {
    LseRows ptr_LSE;
    cute::tuple<cute::_1, cute::tuple<cute::tuple<cute::_0, cute::_0>, cute::_0>> dLSE;
  } params;
};

template <class Element, int kHeadDim>
using ExampleMainloop = cutlass::fmha::collective::Sm100FmhaFwdMainloopTmaWarpspecialized<
    Element, float, float, TileShape<kHeadDim>, Stride, Stride, Stride, ShellMask>;

// Example 77's collective with loads of boxes, and with masks.
template <class Element, int kHeadDim>
struct Mainloop : ExampleMainloop<Element, kHeadDim> {
  using Base = ExampleMainloop<Element, kHeadDim>;
  using TensorStorage = typename Base::TensorStorage;
  using PipelineQ = typename Base::PipelineQ;
  using PipelineKV = typename Base::PipelineKV;
  using PipelineS = typename Base::PipelineS;
  using PipelineC = typename Base::PipelineC;
  using PipelineO = typename Base::PipelineO;
  using PipelineE = typename Base::PipelineE;

  // Operands are laid out for instructions of this depth, 32 bytes.
  static constexpr int kDepth = 32 / sizeof(Element);
  static constexpr auto kTokenFirst = [](int column, int token) {
    return cute::make_coord(cute::make_coord(token, column % kDepth), 0, column / kDepth, 0);
  };
  static constexpr auto kColumnFirst = [](int column, int token) {
    return cute::make_coord(cute::make_coord(column, token % kDepth), 0, token / kDepth, 0);
  };
  static_assert(holds_boxes<Element, kPartRows, kHeadDim>(typename Base::SmemLayoutQ{},
                                                          kTokenFirst));
  static_assert(holds_boxes<Element, kKeys, kHeadDim>(typename Base::SmemLayoutK{}, kTokenFirst));
  static_assert(holds_boxes<Element, kKeys, kHeadDim>(typename Base::SmemLayoutV{}, kColumnFirst));
  static constexpr auto kNextStage = cute::make_coord(cute::make_coord(0, 0), 0, 0, 1);
  static_assert(is_dense<Element, kPartRows, kHeadDim>(typename Base::SmemLayoutQ{}, kNextStage));
  static_assert(is_dense<Element, kKeys, kHeadDim>(typename Base::SmemLayoutK{}, kNextStage));
  static_assert(is_dense<Element, kKeys, kHeadDim>(typename Base::SmemLayoutV{}, kNextStage));

  // The example's own tensor maps stay empty.
  struct Params : Base::Params {
    Problem problem;
    CUtensorMap query, key, value;
    float* lse;
  };

  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
    for (const CUtensorMap* map : {&params.query, &params.key, &params.value}) {
      cute::prefetch_tma_descriptor(map);
    }
  }

  // The warp that loads: Q's first part, K, Q's second part, V, and then of every visit K and V.
  template <class Coord, class Shape>
  CUTLASS_DEVICE void load(const Coord& coord, const Shape&, const Params& params, const JobsShape&,
                           TensorStorage& storage, PipelineQ& query_pipeline,
                           typename PipelineQ::PipelineState& query_write, PipelineKV& pipeline,
                           typename PipelineKV::PipelineState& write) {
    const Problem& problem = params.problem;
    const Job job = gna::job(problem, cute::get<0>(coord));
    const TileWalk walk = tile_walk(problem, job.tile);
    const auto load_query = [&](int part) {
      load_stage<kPartRows, kHeadDim>(params.query, problem, problem.query_heads,
                                      query_place(problem, job, walk, part, kParts), query_pipeline,
                                      query_write, storage.smem_q.data());
    };
    const int count = num_visits(walk);
    WarpVisits visits(problem, job.tile);
    load_query(0);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int visit = 0; visit < count; ++visit) {
      const BoxPlace place = key_place(problem, job, walk, visits.start(visit));
      load_stage<kKeys, kHeadDim>(params.key, problem, problem.kv_heads, place, pipeline, write,
                                  storage.smem_k.data());
      if (visit == 0) load_query(1);
      load_stage<kKeys, kHeadDim>(params.value, problem, problem.kv_heads, place, pipeline, write,
                                  storage.smem_v.data());
    }
  }

  template <class Coord, class Shape>
  CUTLASS_DEVICE void mma(const Coord& coord, const Params& params, const Shape&,
                          TensorStorage& storage, PipelineQ& query_pipeline,
                          typename PipelineQ::PipelineState& query_read, PipelineKV& pipeline,
                          typename PipelineKV::PipelineState& read, PipelineS& scores0,
                          typename PipelineS::PipelineState& scores0_write, PipelineS& scores1,
                          typename PipelineS::PipelineState& scores1_write, PipelineO& out,
                          typename PipelineO::PipelineState& out_write) {
    const Job job = gna::job(params.problem, cute::get<0>(coord));
    Base::mma(coord, params, tile_walk(params.problem, job.tile), storage, query_pipeline,
              query_read, pipeline, read, scores0, scores0_write, scores1, scores1_write, out,
              out_write);
  }

  // `part` is the warpgroup's part of the Q tile.
  template <class Coord, class Shape>
  CUTLASS_DEVICE void softmax(int part, const Coord& coord, const Params& params, const Shape&,
                              PipelineS& scores, typename PipelineS::PipelineState& scores_read,
                              PipelineC& statistics,
                              typename PipelineC::PipelineState& statistics_write,
                              typename Base::OrderBarrierSoftmax& order) {
    const Problem& problem = params.problem;
    const Job job = gna::job(problem, cute::get<0>(coord));
    const TileWalk walk = tile_walk(problem, job.tile);
    const int row = part * kPartRows + threadIdx.x % kPartRows;
    const ThreadTile tile{problem, num_visits(walk), walk.num_clean,
                          row_keys(problem, row_position(problem, walk, row), walk.lengths),
                          WarpVisits(problem, job.tile)};
    Base::softmax(part, coord, params, tile, scores, scores_read, statistics, statistics_write,
                  order);
  }

  template <class Coord, class Shape, class EpilogueStorage, class Epilogue>
  CUTLASS_DEVICE void correction(const Coord& coord, const Params& params, const Shape&,
                                 const JobsShape& jobs_shape, EpilogueStorage& storage,
                                 PipelineC& statistics0,
                                 typename PipelineC::PipelineState& statistics0_read,
                                 PipelineC& statistics1,
                                 typename PipelineC::PipelineState& statistics1_read,
                                 PipelineO& out, typename PipelineO::PipelineState& out_read,
                                 PipelineE& stored, typename PipelineE::PipelineState& stored_write,
                                 Epilogue&) {
    const Problem& problem = params.problem;
    const Job job = gna::job(problem, cute::get<0>(coord));
    const TileWalk walk = tile_walk(problem, job.tile);
    LseEpilogue lse{{{problem, job, walk, params.lse}, {}}};
    Base::correction(coord, params, WalkShape{cute::get<0>(jobs_shape), walk, kHeadDim, {}},
                     jobs_shape, storage, statistics0, statistics0_read, statistics1,
                     statistics1_read, out, out_read, stored, stored_write, lse);
  }

  // The example's way out of a problem without keys: there is none.
  template <class... Arguments>
  CUTLASS_DEVICE void correction_empty(Arguments&&...) {}
};

// Writes the parts of out as boxes.
template <class Element, int kHeadDim>
struct Epilogue {
  static constexpr int NumWarpsEpilogue = 1;
  static constexpr int NumWarpsLoad = 1;
  using Pipeline = cutlass::PipelineAsync<kParts>;

  struct TensorStorage {
    using SmemLayoutO = decltype(cute::tile_to_shape(
        cute::UMMA::Layout_K_SW128_Atom<Element>{},
        cute::Shape<cute::Int<kPartRows>, cute::Int<kHeadDim>, cute::Int<kParts>>{},
        cute::Step<cute::_1, cute::_2, cute::_3>{}));
    cute::array_aligned<Element, kTileRows * kHeadDim, 1024> smem_o;
  };
  static_assert(holds_boxes<Element, kPartRows, kHeadDim>(typename TensorStorage::SmemLayoutO{},
                                                          [](int column, int row) {
                                                            return cute::make_coord(row, column, 0);
                                                          }));

  static_assert(is_dense<Element, kPartRows, kHeadDim>(typename TensorStorage::SmemLayoutO{},
                                                       cute::make_coord(0, 0, 1)));

  struct Arguments {};

  struct Params {
    Problem problem;
    CUtensorMap out;
  };

  const Params& params;

  CUTLASS_DEVICE explicit Epilogue(const Params& params) : params(params) {}

  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
    cute::prefetch_tma_descriptor(&params.out);
  }

  // The warp that stores: each part as soon as the correction has written it.
  template <class Coord, class Shape>
  CUTLASS_DEVICE void store(const Coord& coord, const Shape&, const Params& params,
                            const JobsShape&, TensorStorage& storage, Pipeline& pipeline,
                            typename Pipeline::PipelineState& read) {
    const Problem& problem = params.problem;
    const Job job = gna::job(problem, cute::get<0>(coord));
    const TileWalk walk = tile_walk(problem, job.tile);
    auto release = read;
    const bool is_leader = cute::elect_one_sync();
    CUTLASS_PRAGMA_UNROLL
    for (int part = 0; part < kParts; ++part) {
      pipeline.consumer_wait(read);
      ++read;
      if (is_leader) {
        store_box<kPartRows, kHeadDim>(params.out, problem, problem.query_heads,
                                       query_place(problem, job, walk, part, kParts),
                                       storage.smem_o.data() + part * (kPartRows * kHeadDim));
      }
      cute::tma_store_arrive();
    }
    // A part of the next job may be written once the copy of this one's has read.
    cute::tma_store_wait<1>();
    pipeline.consumer_release(release);
    ++release;
    cute::tma_store_wait<0>();
    pipeline.consumer_release(release);
  }
};

template <class Element, int kHeadDim>
using Kernel = cutlass::fmha::kernel::Sm100FmhaFwdKernelTmaWarpspecialized<
    JobsShape, Mainloop<Element, kHeadDim>, Epilogue<OutElement<Element>, kHeadDim>,
    cutlass::fmha::kernel::PersistentTileScheduler>;

}  // namespace gna::sm100

#endif  // GNA_KERNELS_SM100_FORWARD_H_
