// Boxes of tokens between memory and shared memory by tensor copies (TMA), for both architectures.
//
// A box of one head in shared memory is what the matrix units take as a swizzled operand: chunks of
// columns, each the box's tokens row-major, 128 bytes a token, or a whole head where that is less.
// One tensor copy moves one chunk. Which boxes: `gna/boxes.h`, and nothing here.
#ifndef GNA_KERNELS_BOX_COPY_H_
#define GNA_KERNELS_BOX_COPY_H_

#include <cuda.h>

#include <type_traits>

#include "cute/arch/copy_sm90_desc.hpp"
#include "cute/arch/copy_sm90_tma.hpp"
#include "cute/tensor.hpp"
#include "cutlass/cuda_host_adapter.hpp"
#include "cutlass/numeric_types.h"
#include "cutlass/version.h"
#include "gna/boxes.h"

// The examples are no stable interface: another release needs another look at every member that is
// hidden here.
static_assert(CUTLASS_MAJOR == 4 && CUTLASS_MINOR == 2, "the kernels are written for CUTLASS 4.2");

namespace gna {

// Elements of out: those of the operands, but bfloat16 where these have 8 bits.
template <class Element>
using OutElement = std::conditional_t<sizeof(Element) == 1, cutlass::bfloat16_t, Element>;

// Columns of a chunk: as many as the widest swizzle holds, or those of a head.
template <class Element, int kHeadDim>
constexpr int kChunk = kHeadDim < 128 / int(sizeof(Element)) ? kHeadDim : 128 / sizeof(Element);

// How a tensor map calls an element: to a copy, 8 bits are 8 bits.
template <class Element>
constexpr CUtensorMapDataType kMapType =
    std::is_same_v<Element, cutlass::bfloat16_t> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    : std::is_same_v<Element, cutlass::half_t>   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_UINT8;

// Makes the tensor map of an array with this many heads for boxes of `box` tokens. False where the
// driver refuses.
template <class Element, int kHeadDim>
bool encode(CUtensorMap& map, const Problem& problem, const void* array, int heads,
            const PerAxis& box) {
  constexpr int kColumns = kChunk<Element, kHeadDim>;
  constexpr int kBytes = kColumns * sizeof(Element);
  static_assert(kBytes == 128 || kBytes == 64);
  const TokenView view = token_view(problem, heads);
  const BoxCoordinates extents = box_extents(box, kColumns);
  cuuint64_t sizes[kViewRank], strides[kViewRank];
  cuuint32_t box_sizes[kViewRank], steps[kViewRank];
  for (int axis = 0; axis < kViewRank; ++axis) {
    sizes[axis] = view.extents[axis];
    strides[axis] = view.strides[axis] * sizeof(Element);
    box_sizes[axis] = extents.of[axis];
    steps[axis] = 1;
  }
  return CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
             &map, kMapType<Element>, cuuint32_t{kViewRank}, const_cast<void*>(array), sizes,
             // The fastest dimension's stride is not passed: it is one element.
             strides + 1, box_sizes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             kBytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Starts filling `box` with the tokens at `place` of an array with this many heads. The copies'
// bytes arrive at `barrier`, what lies outside the array as zeros. One thread calls it.
template <int kTokens, int kHeadDim, class Element>
__device__ __forceinline__ void load_box(const CUtensorMap& map, const Problem& problem, int heads,
                                         const BoxPlace& place, uint64_t* barrier, Element* box) {
  constexpr int kColumns = kChunk<Element, kHeadDim>;
  constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
#pragma unroll
  for (int chunk = 0; chunk < kHeadDim / kColumns; ++chunk) {
    const BoxCoordinates at = box_coordinates(problem, heads, place, chunk * kColumns);
    cute::SM90_TMA_LOAD_5D::copy(&map, barrier, kHint, box + chunk * kTokens * kColumns, at.of[0],
                                 at.of[1], at.of[2], at.of[3], at.of[4]);
  }
}

// Loads the box at `place` into the next stage of a pipeline, whose stages lie one behind the other
// from `stages` on. The whole warp calls it.
template <int kTokens, int kHeadDim, class Pipeline, class State, class Element>
__device__ __forceinline__ void load_stage(const CUtensorMap& map, const Problem& problem,
                                           int heads, const BoxPlace& place, Pipeline& pipeline,
                                           State& write, Element* stages) {
  pipeline.producer_acquire(write);
  if (cute::elect_one_sync()) {
    load_box<kTokens, kHeadDim>(map, problem, heads, place, pipeline.producer_get_barrier(write),
                                stages + write.index() * (kTokens * kHeadDim));
  }
  ++write;
}

// Starts writing `box` out to the tokens at `place`; tokens outside the array are dropped. One
// thread calls it, once the copy engine sees what was written to the box, and commits and waits
// afterwards.
template <int kTokens, int kHeadDim, class Element>
__device__ __forceinline__ void store_box(const CUtensorMap& map, const Problem& problem, int heads,
                                          const BoxPlace& place, const Element* box) {
  constexpr int kColumns = kChunk<Element, kHeadDim>;
#pragma unroll
  for (int chunk = 0; chunk < kHeadDim / kColumns; ++chunk) {
    const BoxCoordinates at = box_coordinates(problem, heads, place, chunk * kColumns);
    cute::SM90_TMA_STORE_5D::copy(&map, box + chunk * kTokens * kColumns, at.of[0], at.of[1],
                                  at.of[2], at.of[3], at.of[4]);
  }
}

// A swizzled layout in shared memory: units of 16 bytes change places in rows of 16 << kBits.
template <class Element, int kBits, class Plain>
using Swizzled =
    cute::ComposedLayout<cute::Swizzle<kBits, 4, 3>,
                         cute::smem_ptr_flag_bits<cute::sizeof_bits_v<Element>>, Plain>;

// Whether an operand of kTokens tokens lies in shared memory as boxes do. `coordinate` turns a
// column and a token into coordinates of its layout. Sizes and steps of operands are powers of two,
// so columns and tokens with one bit set tell all.
template <class Element, int kTokens, int kHeadDim, int kBits, class Plain, class Coordinate>
constexpr bool holds_boxes(Swizzled<Element, kBits, Plain>, Coordinate coordinate) {
  constexpr int kColumns = kChunk<Element, kHeadDim>;
  if (16 << kBits != kColumns * sizeof(Element)) return false;
  for (int token = 1; token < kTokens; token *= 2) {
    if (int(Plain{}(coordinate(0, token))) != token * kColumns) return false;
  }
  for (int column = 1; column < kHeadDim; column *= 2) {
    const int offset = Plain{}(coordinate(column, 0));
    if (offset != (column < kColumns ? column : column * kTokens)) return false;
  }
  return true;
}

// Whether the next stage of an operand, at `next` in its layout, lies right behind the first.
template <class Element, int kTokens, int kHeadDim, int kBits, class Plain, class Coordinate>
constexpr bool is_dense(Swizzled<Element, kBits, Plain>, Coordinate next) {
  return int(Plain{}(next)) == kTokens * kHeadDim;
}

}  // namespace gna

#endif  // GNA_KERNELS_BOX_COPY_H_
