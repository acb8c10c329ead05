// From a call to a running kernel: what both architectures' launch functions share. Host code.
#ifndef GNA_KERNELS_START_H_
#define GNA_KERNELS_START_H_

#include <climits>
#include <cmath>

#include "box_copy.h"
#include "cutlass/device_kernel.h"
#include "cutlass/fast_math.h"
#include "gna/tiling.h"
#include "launch.h"

namespace gna {

// Shared memory that a thread block may have, on both architectures.
constexpr int kMaxSharedMemory = 227 * 1024;

// log2(e): the kernels exponentiate with base 2.
constexpr double kLog2E = 1.4426950408889634074;

// An element's name in calls.
template <class Element>
constexpr Dtype kDtype = std::is_same_v<Element, cutlass::bfloat16_t> ? Dtype::kBFloat16
                         : std::is_same_v<Element, cutlass::half_t>   ? Dtype::kFloat16
                                                                      : Dtype::kFloat8E4M3;

// What a launch function returns where `encode` is false.
constexpr const char* kNoTensorMap =
    "the tensor maps need a CUDA driver, arrays that start at multiples of 16 bytes, and steps of "
    "less than 2^40 bytes between tokens; one of these is missing";

// Why a kernel with tiles of q_rows queries and kv_rows keys cannot take a call; nullptr where it
// can.
inline const char* refusal(const ForwardArguments& arguments, int q_rows, int kv_rows) {
  const Problem& problem = arguments.problem;
  if (volume(q_tile(problem)) != q_rows || volume(kv_tile(problem)) != kv_rows) {
    return q_rows == 128 ? "a Q tile holds 128 tokens on Hopper, a KV tile 128; pass such tiles"
                         : "a Q tile holds 256 tokens on Blackwell, a KV tile 128; pass such tiles";
  }
  // Unseen keys weigh exp(scale * -inf).
  if (!(problem.scale > 0.0f) || std::isinf(problem.scale)) {
    return "the CUTLASS kernels need a positive, finite scale; use another implementation";
  }
  // Coordinates of tensor copies are 32-bit, and so is the number of rows of all jobs.
  const TokenView query = token_view(problem, problem.query_heads);
  if (query.extents[0] > INT_MAX || query.extents[2] > INT_MAX) {
    return "dilation * heads * head_dim of the last axis, and batch times the tokens of the other "
           "axes, must stay below 2^31; split the batch or the heads";
  }
  if (num_jobs(problem) > INT_MAX / q_rows) {
    return "batch * heads * queries, in whole Q tiles, must stay below 2^31; split the batch";
  }
  return nullptr;
}

// Starts a kernel of the examples on the call's stream; nullptr on success, else CUDA's words.
template <class Kernel>
const char* start(const typename Kernel::Params& params, cudaStream_t stream) {
  static_assert(Kernel::SharedStorageSize <= kMaxSharedMemory);
  constexpr auto kernel = cutlass::device_kernel<Kernel>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           Kernel::SharedStorageSize);
  if (error == cudaSuccess) {
    kernel<<<Kernel::get_grid_shape(params), Kernel::get_block_shape(), Kernel::SharedStorageSize,
             stream>>>(params);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Launches an instance of an architecture's kernel on a call that the kernel does not refuse;
// `parts` share a Q tile. `set_own` sets those parameters that no other architecture's kernel has.
template <template <class, int> class Kernel, class Element, int kHeadDim, class SetOwn>
const char* launch(const ForwardArguments& arguments, int parts, const SetOwn& set_own) {
  using Instance = Kernel<Element, kHeadDim>;
  const Problem& problem = arguments.problem;
  typename Instance::Params params{};
  auto& mainloop = params.mainloop;
  auto& epilogue = params.epilogue;
  mainloop.problem = epilogue.problem = problem;
  mainloop.scale_softmax = problem.scale;
  mainloop.scale_softmax_log2 = static_cast<float>(kLog2E * problem.scale);
  // A row of jobs: those of one head lie side by side, see `gna::job`. Filled here, where every
  // kernel has a function of its own: the examples' schedulers have one name and two layouts.
  auto& scheduler = params.tile_scheduler;
  scheduler.num_blocks = static_cast<int>(num_jobs(problem));
  scheduler.divmod_m_block = cutlass::FastDivmod(scheduler.num_blocks);
  scheduler.divmod_b = scheduler.divmod_h = cutlass::FastDivmod(1);
  scheduler.hw_info.sm_count = arguments.num_sms;
  set_own(params);

  const PerAxis own = part_shape(q_tile(problem), parts), visited = kv_tile(problem);
  constexpr auto kOperand = encode<Element, kHeadDim>;
  constexpr auto kOut = encode<OutElement<Element>, kHeadDim>;
  if (!kOperand(mainloop.query, problem, arguments.query, problem.query_heads, own) ||
      !kOperand(mainloop.key, problem, arguments.key, problem.kv_heads, visited) ||
      !kOperand(mainloop.value, problem, arguments.value, problem.kv_heads, visited) ||
      !kOut(epilogue.out, problem, arguments.out, problem.query_heads, own)) {
    return kNoTensorMap;
  }
  return start<Instance>(params, arguments.stream);
}

// Launches the instance for the call's dtype, one of `Element, Others...`, and its head dim.
template <template <class, int> class Kernel, class Element, class... Others, class SetOwn>
const char* launch_instance(const ForwardArguments& arguments, int parts, const SetOwn& set_own) {
  if (arguments.dtype == kDtype<Element>) {
    return arguments.problem.head_dim == 128
               ? launch<Kernel, Element, 128>(arguments, parts, set_own)
               : launch<Kernel, Element, 64>(arguments, parts, set_own);
  }
  if constexpr (sizeof...(Others) == 0) {
    return "this generation's kernel does not take the dtype; cast the operands to bfloat16";
  } else {
    return launch_instance<Kernel, Others...>(arguments, parts, set_own);
  }
}

}  // namespace gna

#endif  // GNA_KERNELS_START_H_
