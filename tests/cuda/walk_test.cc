// The geometry without Python: the visits of a Q tile meet every key that its queries see exactly
// once, and the first num_clean of them have no masked pair. `cuda_geometry_test.py` compares with
// the Python.
#include <cstdio>
#include <map>

#include "gna/tiling.h"

namespace {

// Faults of one Q tile of a dilation group of `length` tokens.
int faults_of_tile(const gna::Axis& axis, int length, int q_start) {
  gna::TileWalk walk;
  walk.axes[0] = gna::key_walk(axis, length, q_start);
  // The other axes hold one token each.
  for (int other : {1, 2}) walk.axes[other] = gna::key_walk(gna::Axis(), 1, 0);
  walk.num_clean = gna::clean_visits(walk.axes[0]).count;
  walk.num_visits = walk.axes[0].num_visits;

  std::map<int, int> visits_of_key;
  int faults = 0;
  for (int visit = 0; visit < walk.num_visits; ++visit) {
    const int start = gna::visit_start(walk, visit)[0];
    for (int key = start; key < start + axis.kv_tile; ++key) {
      ++visits_of_key[key];
      for (int query = q_start; query < length && query < q_start + axis.q_tile; ++query) {
        const gna::Interval seen = gna::keys(axis, query, length);
        const bool is_masked = key < seen.first || key >= seen.end;
        faults += visit < walk.num_clean && is_masked;
      }
    }
  }
  for (int query = q_start; query < length && query < q_start + axis.q_tile; ++query) {
    const gna::Interval seen = gna::keys(axis, query, length);
    for (int key = seen.first; key < seen.end; ++key) faults += visits_of_key[key] != 1;
  }
  return faults;
}

}  // namespace

int main() {
  int64_t tiles = 0, faults = 0;
  for (int length = 1; length <= 16; ++length) {
    for (int window = 1; window <= length; ++window) {
      for (int stride = 1; stride <= window; ++stride) {
        for (bool is_causal : {false, true}) {
          for (int q_tile : {1, 4, 8}) {
            for (int kv_tile : {1, 4, 8}) {
              const gna::Axis axis{length, window, stride, 1, is_causal, q_tile, kv_tile};
              for (int q_start = 0; q_start < length; q_start += q_tile) {
                faults += faults_of_tile(axis, length, q_start);
                ++tiles;
              }
            }
          }
        }
      }
    }
  }
  std::printf("%lld tiles, %lld faults\n", static_cast<long long>(tiles),
              static_cast<long long>(faults));
  return faults != 0 || tiles == 0;
}
