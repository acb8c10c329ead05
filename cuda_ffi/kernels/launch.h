// The kernels as the handlers call them: one function per architecture, whose objects need not be
// linked both.
#ifndef GNA_KERNELS_LAUNCH_H_
#define GNA_KERNELS_LAUNCH_H_

#include <cuda_runtime_api.h>

#include "gna/problem.h"

namespace gna {

// Of query, key and value, and of out, but out of 8-bit operands is bfloat16.
enum class Dtype { kBFloat16, kFloat16, kFloat8E4M3 };

// A call of the forward: out and lse from query, key and value, all in device memory, every array
// as `Problem` says.
struct ForwardArguments {
  Problem problem;
  Dtype dtype;
  const void* query;
  const void* key;
  const void* value;
  void* out;
  float* lse;
  // Multiprocessors of the device: the kernels start as many blocks at most, and each takes one job
  // after the other.
  int num_sms;
  cudaStream_t stream;
};

// Starts the forward on the stream, and nothing else: no allocation, no synchronisation. nullptr on
// success, else why not.
extern const char* launch_sm90_forward(const ForwardArguments& arguments);
extern const char* launch_sm100_forward(const ForwardArguments& arguments);

}  // namespace gna

#endif  // GNA_KERNELS_LAUNCH_H_
