// The forward on Hopper: CUTLASS's example 88 with other tiles, other masks and another way to and
// from memory.
//
// What stays the example's: roles of warps, pipelines, both products, the online softmax, the
// scheduler of jobs. What is ours hides a member of the example's collectives: `Mainloop` loads
// boxes of tokens and tells `compute` what its rows see, `ShellMask` masks them, `Epilogue` stores
// out and lse. Coordinates, visits and masks come from `gna/`.
#ifndef GNA_KERNELS_SM90_FORWARD_H_
#define GNA_KERNELS_SM90_FORWARD_H_

#include <cmath>

#include "88_hopper_fmha/collective/fmha_collective_tma_warpspecialized.hpp"
#include "88_hopper_fmha/collective/fmha_fusion.hpp"
#include "88_hopper_fmha/kernel/fmha_kernel_tma_warpspecialized.hpp"
#include "88_hopper_fmha/kernel/fmha_options.hpp"
#include "88_hopper_fmha/kernel/fmha_tile_scheduler.hpp"
#include "box_copy.h"
#include "gna/masks.h"
#include "launch.h"
#include "warp_visits.h"

// The example leaves 24 registers to each thread of the warps that load. Here these also find out
// what to load, so the block's registers are shared out anew: 40 + 2 * 232 instead of 24 + 2 * 240.
template <>
CUTLASS_DEVICE void cutlass::arch::warpgroup_reg_dealloc<24>() {
  warpgroup_reg_dealloc<40>();
}
template <>
CUTLASS_DEVICE void cutlass::arch::warpgroup_reg_alloc<240>() {
  warpgroup_reg_alloc<232>();
}

namespace gna::sm90 {

// Two warpgroups share a Q tile, one part of 64 rows each, and take turns on the matrix unit.
constexpr int kParts = 2;
constexpr int kPartRows = 64;
constexpr int kTileRows = kParts * kPartRows;
constexpr int kKeys = 128;
// Rows of the scores that one thread holds: numbers r and r + 8 of its warp's 16.
constexpr int kThreadRows = 2;

// The 4 threads that hold the same rows: of every 8 columns, thread t of them has 2 t and 2 t + 1.
constexpr int kRowThreads = 4;
static_assert(kKeys == kRowThreads * kWordBits, "each thread of a row makes one word of its mask");

using Stride = cute::tuple<int, cute::_1, cute::tuple<int, int>>;

// A tile as one thread of a warpgroup sees it.
struct ThreadTile {
  const Problem& problem;
  int num_visits;
  int num_clean;
  RowKeys rows[kThreadRows];
  // The example passes tiles on as constants.
  mutable WarpVisits visits;
};

// Number in the Q tile of this thread's row `row`, 0 or 1, of part `part`.
CUTLASS_DEVICE int tile_row(int part, int row) {
  const int thread = threadIdx.x % cutlass::NumThreadsPerWarpGroup;
  return part * kPartRows + thread / cutlass::NumThreadsPerWarp * 16 +
         thread % cutlass::NumThreadsPerWarp / kRowThreads + 8 * row;
}

// The visits and masks of a tile, in the terms of the example's fusions.
struct ShellMask {
  template <class Coord, class TileShape>
  CUTLASS_DEVICE int get_trip_count(const Coord&, const TileShape&, const ThreadTile& tile) {
    return tile.num_visits;
  }

  template <class Coord, class TileShape>
  CUTLASS_DEVICE int get_unmasked_trip_count(const Coord&, const TileShape&,
                                             const ThreadTile& tile) {
    return tile.num_clean;
  }

  template <class Coord, class TileShape>
  CUTLASS_DEVICE int get_masked_trip_count(const Coord&, const TileShape&, const ThreadTile& tile) {
    return tile.num_visits - tile.num_clean;
  }

  // Hides the scores of unseen keys. A score's place is its row, and kKeys * visit + key.
  template <class Scores, class Places>
  CUTLASS_DEVICE void before_softmax(Scores& scores, const Places& places, const ThreadTile& tile) {
    using namespace cute;
    // Scores of a thread: 2 columns, its rows, and so on for every 8 columns.
    CUTE_STATIC_ASSERT_V(size(scores) == Int<kThreadRows * kKeys / kRowThreads>{});
    CUTE_STATIC_ASSERT_V(places.layout()(Int<1>{}) == make_coord(_0{}, _1{}));
    CUTE_STATIC_ASSERT_V(places.layout()(Int<2>{}) == make_coord(_8{}, _0{}));
    CUTE_STATIC_ASSERT_V(places.layout()(size(scores) - _4{}) ==
                         make_coord(_0{}, Int<kKeys - 8>{}));
    const PerAxis start = tile.visits.start(get<1>(places(_0{})) / kKeys);
    const int thread = threadIdx.x % kRowThreads;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kThreadRows; ++row) {
      const uint32_t own_word = row_word(tile.problem, tile.rows[row], start, thread);
      CUTLASS_PRAGMA_UNROLL
      for (int word = 0; word < kRowThreads; ++word) {
        // The thread's first column becomes bit 0: the bits to test are then constants.
        const uint32_t bits = __shfl_sync(~0u, own_word, word, kRowThreads) >> 2 * thread;
        CUTLASS_PRAGMA_UNROLL
        for (int octet = 0; octet < kWordBits / 8; ++octet) {
          CUTLASS_PRAGMA_UNROLL
          for (int column = 0; column < 2; ++column) {
            float& score = scores(column + 2 * row + 4 * (word * kWordBits / 8 + octet));
            score = (bits >> (8 * octet + column)) & 1 ? score : -INFINITY;
          }
        }
      }
    }
  }
};

using IsPersistent =
    cutlass::fmha::kernel::Option<cutlass::fmha::kernel::Tag::kIsPersistent, cute::true_type>;
using LoadsQSeparately =
    cutlass::fmha::kernel::Option<cutlass::fmha::kernel::Tag::kLoadsQSeparately, cute::true_type>;

template <class Element, int kHeadDim>
using ExampleMainloop = cutlass::fmha::collective::FmhaMainloopTmaWarpSpecialized<
    Element, float, float, cute::Shape<cute::Int<kTileRows>, cute::Int<kKeys>, cute::Int<kHeadDim>>,
    Stride, Stride, Stride, ShellMask, IsPersistent, LoadsQSeparately>;

// Example 88's collective with loads of boxes, and with masks.
template <class Element, int kHeadDim>
struct Mainloop : ExampleMainloop<Element, kHeadDim> {
  using Base = ExampleMainloop<Element, kHeadDim>;
  using MainloopPipeline = typename Base::MainloopPipeline;
  using MainloopPipelineQ = typename Base::MainloopPipelineQ;
  using PipelineState = typename Base::PipelineState;
  using SharedStorage = typename Base::SharedStorage;
  using PipelineStateQ = typename Base::PipelineStateQ;

  static constexpr auto kTokenFirst = [](int column, int token) {
    return cute::make_coord(token, column, 0);
  };
  static constexpr auto kColumnFirst = [](int column, int token) {
    return cute::make_coord(column, token, 0);
  };
  static_assert(holds_boxes<Element, kPartRows, kHeadDim>(typename Base::SmemLayoutQ{},
                                                          kTokenFirst));
  static_assert(holds_boxes<Element, kKeys, kHeadDim>(typename Base::SmemLayoutK{}, kTokenFirst));
  static_assert(holds_boxes<Element, kKeys, kHeadDim>(typename Base::SmemLayoutV{}, kColumnFirst));
  static constexpr auto kNextStage = cute::make_coord(0, 0, 1);
  static_assert(is_dense<Element, kPartRows, kHeadDim>(typename Base::SmemLayoutQ{}, kNextStage));
  static_assert(is_dense<Element, kKeys, kHeadDim>(typename Base::SmemLayoutK{}, kNextStage));
  static_assert(is_dense<Element, kKeys, kHeadDim>(typename Base::SmemLayoutV{}, kNextStage));

  // The example's own tensor maps stay empty.
  struct Params : Base::Params {
    Problem problem;
    CUtensorMap query, key, value;
  };

  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
    for (const CUtensorMap* map : {&params.query, &params.key, &params.value}) {
      cute::prefetch_tma_descriptor(map);
    }
  }

  // The warp that loads K and V: of every visit first K, then V. In the example the first V waits
  // for the other warp's first Q, here not.
  template <bool kLoadsQuery, class Coord, class Shape, class Barrier>
  CUTLASS_DEVICE void load_kv_maybe_q(int, const Coord& coord, const Params& params, const Shape&,
                                      MainloopPipeline& pipeline, PipelineState& write,
                                      MainloopPipelineQ&, PipelineStateQ&, SharedStorage& storage,
                                      Barrier&, bool) {
    static_assert(!kLoadsQuery, "another warp loads Q");
    const Problem& problem = params.problem;
    const Job job = gna::job(problem, cute::get<0>(coord));
    const TileWalk walk = tile_walk(problem, job.tile);
    const int count = num_visits(walk);
    WarpVisits visits(problem, job.tile);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int visit = 0; visit < count; ++visit) {
      const BoxPlace place = key_place(problem, job, walk, visits.start(visit));
      load_stage<kKeys, kHeadDim>(params.key, problem, problem.kv_heads, place, pipeline, write,
                                  storage.smem_k.data());
      load_stage<kKeys, kHeadDim>(params.value, problem, problem.kv_heads, place, pipeline, write,
                                  storage.smem_v.data());
    }
  }

  // The warp that loads Q, one part for each warpgroup.
  template <class Coord, class Shape, class Barrier>
  CUTLASS_DEVICE void load_maybe_q(const Coord& coord, const Params& params, const Shape&,
                                   MainloopPipelineQ& pipeline, PipelineStateQ& write,
                                   SharedStorage& storage, Barrier&, bool) {
    const Problem& problem = params.problem;
    const Job job = gna::job(problem, cute::get<0>(coord));
    const TileWalk walk = tile_walk(problem, job.tile);
    for (int part = 0; part < kParts; ++part) {
      const BoxPlace place = query_place(problem, job, walk, part, kParts);
      load_stage<kPartRows, kHeadDim>(params.query, problem, problem.query_heads, place, pipeline,
                                      write, storage.smem_q.data());
    }
  }

  // A warpgroup's part of a tile: its out, and lse of this thread's rows. `part_coord` counts
  // parts.
  template <class Coord, class Shape, class ReducerPipeline, class ReducerState, class OrderBarrier>
  CUTLASS_DEVICE auto compute(const Coord& coord, const Coord& part_coord, const Params& params,
                              const Shape&, MainloopPipeline& pipeline, PipelineState& read,
                              MainloopPipelineQ& query_pipeline, PipelineStateQ& query_read,
                              ReducerPipeline& reducer, ReducerState& reducer_write,
                              SharedStorage& storage, OrderBarrier& order) {
    const Problem& problem = params.problem;
    const int part = cute::get<0>(part_coord) % kParts;
    const Job job = gna::job(problem, cute::get<0>(coord));
    const TileWalk walk = tile_walk(problem, job.tile);
    ThreadTile tile{problem, num_visits(walk), walk.num_clean, {}, WarpVisits(problem, job.tile)};
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kThreadRows; ++row) {
      tile.rows[row] =
          row_keys(problem, row_position(problem, walk, tile_row(part, row)), walk.lengths);
    }
    return Base::compute(coord, part_coord, params, tile, pipeline, read, query_pipeline,
                         query_read, reducer, reducer_write, storage, order);
  }
};

// Writes a warpgroup's part of out as a box, and lse row by row.
template <class Element, int kHeadDim>
struct Epilogue {
  using SmemLayout = decltype(cute::tile_to_shape(
      cute::GMMA::Layout_K_SW128_Atom<Element>{},
      cute::Shape<cute::Int<kPartRows>, cute::Int<kHeadDim>>{}, cute::Step<cute::_1, cute::_2>{}));
  static_assert(holds_boxes<Element, kPartRows, kHeadDim>(SmemLayout{}, [](int column, int row) {
    return cute::make_coord(row, column);
  }));

  // One per warpgroup.
  struct alignas(1024) TensorStorage {
    Element out[kPartRows * kHeadDim];
  };

  // Nothing is loaded here; the example's kernel has a pipeline for it all the same.
  using LoadPipeline = cutlass::PipelineTransactionAsync<1>;
  using PipelineStorage = typename LoadPipeline::SharedStorage;
  static constexpr int TmaTransactionBytes = 0;

  struct Arguments {};

  struct Params {
    Problem problem;
    CUtensorMap out;
    float* lse;
  };

  template <class TileShape, class Coord, class Result, class TiledMma, class Shape>
  CUTLASS_DEVICE void operator()(const TileShape&, const Coord& part_coord, const Result& result,
                                 const TiledMma& tiled_mma, const Shape&, const Params& params,
                                 LoadPipeline, TensorStorage& storage) {
    using namespace cute;
    const Problem& problem = params.problem;
    const int part = get<0>(part_coord) % kParts;
    const Job job = gna::job(problem, get<0>(part_coord) / kParts);
    const TileWalk walk = tile_walk(problem, job.tile);
    store_lse(problem, job, walk, part, get<1>(result), params.lse);

    // Nobody writes before the copy of the warpgroup's last job has read, and nobody copies before
    // all have written.
    cutlass::arch::NamedBarrier::sync(cutlass::NumThreadsPerWarpGroup, part);
    Tensor box = make_tensor(make_smem_ptr(storage.out), SmemLayout{});
    const int thread = threadIdx.x % cutlass::NumThreadsPerWarpGroup;
    Tensor target = tiled_mma.get_thread_slice(thread).partition_C(box);
    Tensor rounded = make_fragment_like<Element>(get<0>(result));
    copy(get<0>(result), rounded);
    copy(AutoVectorizingCopyWithAssumedAlignment<32>{}, rounded, target);
    tma_store_fence();
    cutlass::arch::NamedBarrier::sync(cutlass::NumThreadsPerWarpGroup, part);
    if (thread < cutlass::NumThreadsPerWarp && elect_one_sync()) {
      const BoxPlace place = query_place(problem, job, walk, part, kParts);
      store_box<kPartRows, kHeadDim>(params.out, problem, problem.query_heads, place, storage.out);
      tma_store_arrive();
      tma_store_wait<0>();
    }
  }

 private:
  template <class RowStatistics>
  CUTLASS_DEVICE static void store_lse(const Problem& problem, const Job& job, const TileWalk& walk,
                                       int part, const RowStatistics& lse, float* memory) {
    if (threadIdx.x % kRowThreads != 0) return;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kThreadRows; ++row) {
      const PerAxis position = row_position(problem, walk, tile_row(part, row));
      if (!is_real(position, walk.lengths)) continue;
      memory[query_offset(problem, job, walk.residues, position)] = lse(row);
    }
  }
};

template <class Element, int kHeadDim>
using Kernel = cutlass::fmha::kernel::FmhaKernelTmaWarpSpecialized<
    Mainloop<Element, kHeadDim>, Epilogue<Element, kHeadDim>,
    cutlass::fmha::kernel::PersistentTileScheduler, IsPersistent, LoadsQSeparately>;

}  // namespace gna::sm90

#endif  // GNA_KERNELS_SM90_FORWARD_H_
