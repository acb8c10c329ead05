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

// The scheduler's parameters for a row of jobs: jobs of one head lie side by side, see `gna::job`.
// Static: the examples' schedulers have one name and two layouts.
template <class Scheduler>
static typename Scheduler::Params schedule(const ForwardArguments& arguments) {
  typename Scheduler::Params params{};
  params.num_blocks = static_cast<int>(num_jobs(arguments.problem));
  params.divmod_m_block = cutlass::FastDivmod(params.num_blocks);
  params.divmod_b = params.divmod_h = cutlass::FastDivmod(1);
  params.hw_info.sm_count = arguments.num_sms;
  return params;
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

}  // namespace gna

#endif  // GNA_KERNELS_START_H_
