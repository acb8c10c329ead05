// The handler for CUDA on a device that is made up, for `cuda_backend_test.py`: what it asks the
// device, and what reaches which kernel. The test writes a `cuda_runtime_api.h` that declares as
// much of CUDA's runtime as the handler calls.
#include "handlers/forward_cuda.cc"

namespace {

int device_major, device_minor;
bool device_fails;
const char* kernel_reason;
std::string launched;

const char* note(const char* kernel, const gna::ForwardArguments& a) {
  const gna::Axis& axis = a.problem.axes[0];
  const auto at = [](const void* array) {
    return std::to_string(reinterpret_cast<uintptr_t>(array));
  };
  launched = std::string(kernel) + " rank " + std::to_string(a.problem.rank) + " length " +
             std::to_string(axis.length) + " window " + std::to_string(axis.window) + " stride " +
             std::to_string(axis.stride) + " dilation " + std::to_string(axis.dilation) +
             " causal " + std::to_string(axis.is_causal) + " tiles " + std::to_string(axis.q_tile) +
             " " + std::to_string(axis.kv_tile) + " batch " + std::to_string(a.problem.batch) +
             " heads " + std::to_string(a.problem.query_heads) + " " +
             std::to_string(a.problem.kv_heads) + " dim " + std::to_string(a.problem.head_dim) +
             " scale " + std::to_string(a.problem.scale) + " dtype " +
             std::to_string(static_cast<int>(a.dtype)) + " arrays " + at(a.query) + " " +
             at(a.key) + " " + at(a.value) + " " + at(a.out) + " " + at(a.lse) + " sms " +
             std::to_string(a.num_sms) + " stream " + at(a.stream);
  return kernel_reason;
}

}  // namespace

cudaError_t cudaGetDevice(int* device) {
  *device = 3;
  return device_fails ? 1 : cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const int values[] = {device_major, device_minor, 132};
  *value = values[attribute];
  return device == 3 ? cudaSuccess : 1;
}
const char* cudaGetErrorString(cudaError_t) { return "no device"; }

namespace gna {

const char* launch_sm90_forward(const ForwardArguments& arguments) {
  return note("sm90", arguments);
}
const char* launch_sm100_forward(const ForwardArguments& arguments) {
  return note("sm100", arguments);
}

}  // namespace gna

// A call made for a generation, of a dtype (0 bfloat16, 1 float16, 2 float8_e4m3fn), on a device of
// another or the same: what was launched, or the error.
GNA_EXPORT const char* dispatch(int made_for, int dtype, int major, int minor, bool fails,
                                const char* reason) {
  device_major = major;
  device_minor = minor;
  device_fails = fails;
  kernel_reason = reason;
  launched.clear();
  int64_t query[] = {5, 2, 34, 6, 64}, key[] = {5, 2, 34, 3, 64}, layout[] = {33}, window[] = {-1};
  int64_t stride[] = {3}, dilation[] = {2}, causal[] = {1}, q_tile[] = {made_for == 9 ? 128 : 256};
  int64_t kv_tile[] = {128}, capability[] = {made_for, 0};
  const XLA_FFI_DataType operands[] = {XLA_FFI_DataType_BF16, XLA_FFI_DataType_F16,
                                       XLA_FFI_DataType_F8E4M3FN};
  XLA_FFI_Buffer buffers[5] = {};
  for (int i = 0; i < 5; ++i) {
    buffers[i].dtype = i == 4                 ? XLA_FFI_DataType_F32
                       : i == 3 && dtype == 2 ? XLA_FFI_DataType_BF16
                                              : operands[dtype];
    buffers[i].data = reinterpret_cast<void*>(uintptr_t{16} * (i + 1));
    buffers[i].rank = i == 4 ? 4 : 5;
    buffers[i].dims = i == 1 || i == 2 ? key : query;
  }
  using gna::Sizes;
  using xla::ffi::AnyBuffer;
  const gna::Attributes attributes{Sizes(layout, 1),   Sizes(window, 1),     Sizes(stride, 1),
                                   Sizes(dilation, 1), Sizes(causal, 1),     Sizes(q_tile, 1),
                                   Sizes(kv_tile, 1),  Sizes(capability, 2), 0.5f};
  const auto stream = reinterpret_cast<cudaStream_t>(uintptr_t{77});
  const xla::ffi::Error error =
      gna::forward(stream, AnyBuffer(&buffers[0]), AnyBuffer(&buffers[1]), AnyBuffer(&buffers[2]),
                   xla::ffi::Result<AnyBuffer>(AnyBuffer(&buffers[3])),
                   xla::ffi::Result<AnyBuffer>(AnyBuffer(&buffers[4])), attributes);
  if (error.failure()) launched = error.message();
  return launched.c_str();
}
