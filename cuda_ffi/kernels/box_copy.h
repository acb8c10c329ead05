// Boxes of tokens between memory and shared memory by tensor copies (TMA), for both architectures.
//
// A box of one head in shared memory is what the matrix units take as an operand with 128-byte
// swizzle: chunks of 64 columns, each the box's tokens row-major, 128 bytes a token. One tensor
// copy moves one chunk. Which boxes: `gna/boxes.h`, and nothing here.
#ifndef GNA_KERNELS_BOX_COPY_H_
#define GNA_KERNELS_BOX_COPY_H_

#include <cuda.h>

#include "cute/arch/copy_sm90_desc.hpp"
#include "cute/arch/copy_sm90_tma.hpp"
#include "cute/tensor.hpp"
#include "cutlass/cuda_host_adapter.hpp"
#include "cutlass/version.h"
#include "gna/boxes.h"

// The examples are no stable interface: another release needs another look at every member that is
// hidden here.
static_assert(CUTLASS_MAJOR == 4 && CUTLASS_MINOR == 2, "the kernels are written for CUTLASS 4.2");

namespace gna {

// Columns of a chunk of 16-bit elements: 128 bytes, the widest swizzle.
constexpr int kChunk = 64;

// Makes the tensor map of an array with this many heads for boxes of `box` tokens. False where the
// driver refuses.
inline bool encode(CUtensorMap& map, const Problem& problem, const void* array, bool is_bfloat16,
                   int heads, const PerAxis& box) {
  const TokenView view = token_view(problem, heads);
  const BoxCoordinates extents = box_extents(box, kChunk);
  cuuint64_t sizes[kViewRank], strides[kViewRank];
  cuuint32_t box_sizes[kViewRank], steps[kViewRank];
  for (int axis = 0; axis < kViewRank; ++axis) {
    sizes[axis] = view.extents[axis];
    strides[axis] = view.strides[axis] * sizeof(uint16_t);
    box_sizes[axis] = extents.of[axis];
    steps[axis] = 1;
  }
  return CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
             &map, is_bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             cuuint32_t{kViewRank}, const_cast<void*>(array), sizes,
             // The fastest dimension's stride is not passed: it is one element.
             strides + 1, box_sizes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Starts filling `box` with the tokens at `place` of an array with this many heads. The copies'
// bytes arrive at `barrier`, what lies outside the array as zeros. One thread calls it.
template <int kTokens, int kHeadDim, class Element>
__device__ __forceinline__ void load_box(const CUtensorMap& map, const Problem& problem, int heads,
                                         const BoxPlace& place, uint64_t* barrier, Element* box) {
  constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
#pragma unroll
  for (int chunk = 0; chunk < kHeadDim / kChunk; ++chunk) {
    const BoxCoordinates at = box_coordinates(problem, heads, place, chunk * kChunk);
    cute::SM90_TMA_LOAD_5D::copy(&map, barrier, kHint, box + chunk * kTokens * kChunk, at.of[0],
                                 at.of[1], at.of[2], at.of[3], at.of[4]);
  }
}

// Starts writing `box` out to the tokens at `place`; tokens outside the array are dropped. One
// thread calls it, once the copy engine sees what was written to the box, and commits and waits
// afterwards.
template <int kTokens, int kHeadDim, class Element>
__device__ __forceinline__ void store_box(const CUtensorMap& map, const Problem& problem, int heads,
                                          const BoxPlace& place, const Element* box) {
#pragma unroll
  for (int chunk = 0; chunk < kHeadDim / kChunk; ++chunk) {
    const BoxCoordinates at = box_coordinates(problem, heads, place, chunk * kChunk);
    cute::SM90_TMA_STORE_5D::copy(&map, box + chunk * kTokens * kChunk, at.of[0], at.of[1],
                                  at.of[2], at.of[3], at.of[4]);
  }
}

// Whether an operand of kTokens tokens, in the 128-byte swizzle of 16-bit elements, lies in shared
// memory as boxes do. `coordinate` turns a column and a token into coordinates of its layout. Sizes
// and steps of operands are powers of two, so columns and tokens with one bit set tell all.
template <int kTokens, int kHeadDim, class Plain, class Coordinate>
constexpr bool holds_boxes(
    cute::ComposedLayout<cute::Swizzle<3, 4, 3>, cute::smem_ptr_flag_bits<16>, Plain>,
    Coordinate coordinate) {
  for (int token = 1; token < kTokens; token *= 2) {
    if (int(Plain{}(coordinate(0, token))) != token * kChunk) return false;
  }
  for (int column = 1; column < kHeadDim; column *= 2) {
    const int offset = Plain{}(coordinate(column, 0));
    if (offset != (column < kChunk ? column : column * kTokens)) return false;
  }
  return true;
}

// Whether the next stage of an operand, at `next` in its layout, lies right behind the first.
template <int kTokens, int kHeadDim, class Plain, class Coordinate>
constexpr bool is_dense(
    cute::ComposedLayout<cute::Swizzle<3, 4, 3>, cute::smem_ptr_flag_bits<16>, Plain>,
    Coordinate next) {
  return int(Plain{}(next)) == kTokens * kHeadDim;
}

}  // namespace gna

#endif  // GNA_KERNELS_BOX_COPY_H_
