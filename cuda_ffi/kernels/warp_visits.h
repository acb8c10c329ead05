// Where the visits of a tile start, for one warp: found a batch at a time, one visit per lane.
//
// A visit's start in closed form (`visit_start`) takes some divisions, and the walk that it needs
// many registers. So a warp keeps neither: every 32 visits it makes the walk anew, each lane finds
// one visit's start, and the others read it from there.
#ifndef GNA_KERNELS_WARP_VISITS_H_
#define GNA_KERNELS_WARP_VISITS_H_

#include "cutlass/cutlass.h"
#include "gna/tiling.h"

namespace gna {

class WarpVisits {
 public:
  CUTLASS_DEVICE WarpVisits(const Problem& problem, int tile) : problem_(problem), tile_(tile) {}

  // First token of the KV tile of a visit. All lanes ask for the same visits.
  CUTLASS_DEVICE PerAxis start(int visit) {
    if (visit < batch_ || visit >= batch_ + cutlass::NumThreadsPerWarp) {
      batch_ = visit;
      // Past the last visit this is no visit's start, and nobody asks for it.
      of_lane_ = visit_start(tile_walk(problem_, tile_), visit + cutlass::canonical_lane_idx());
    }
    PerAxis start;
    CUTLASS_PRAGMA_UNROLL
    for (int axis = 0; axis < kMaxRank; ++axis) {
      start[axis] = __shfl_sync(~0u, of_lane_[axis], visit - batch_);
    }
    return start;
  }

 private:
  const Problem& problem_;
  int tile_;
  // First visit of the batch; none yet.
  int batch_ = -cutlass::NumThreadsPerWarp;
  PerAxis of_lane_;
};

// Visits of a tile, at least one: a tile without tokens is visited like all others, and stores
// nothing, so every job takes the same barriers.
CUTLASS_DEVICE int num_visits(const TileWalk& walk) { return maximum(walk.num_visits, 1); }

}  // namespace gna

#endif  // GNA_KERNELS_WARP_VISITS_H_
