// The forward on a GPU: a checked call goes to the kernel of the device's generation. Nothing is
// computed, copied or allocated here, so XLA may record it into a CUDA graph.
#include <cuda_runtime_api.h>

#include <string>

#include "abi.h"
#include "decode.h"
#include "kernels/launch.h"

namespace gna {
namespace {

ffi::Error failed(const char* what, const char* reason) {
  return ffi::Error::Internal(std::string("gna_jax_forward: ") + what + ": " + reason);
}

// The current device, which XLA has set.
struct Device {
  int number, major, minor, num_sms;
};

cudaError_t query_device(Device& device) {
  cudaError_t error = cudaGetDevice(&device.number);
  const struct {
    int& value;
    cudaDeviceAttr attribute;
  } all[] = {{device.major, cudaDevAttrComputeCapabilityMajor},
             {device.minor, cudaDevAttrComputeCapabilityMinor},
             {device.num_sms, cudaDevAttrMultiProcessorCount}};
  for (const auto& one : all) {
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&one.value, one.attribute, device.number);
  }
  return error;
}

// Of a call's operands, which `decode` has checked.
Dtype dtype_of(const ffi::AnyBuffer& query) {
  switch (query.element_type()) {
    case ffi::DataType::BF16:
      return Dtype::kBFloat16;
    case ffi::DataType::F16:
      return Dtype::kFloat16;
    default:
      return Dtype::kFloat8E4M3;
  }
}

ffi::Error forward(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                   ffi::AnyBuffer value, ffi::Result<ffi::AnyBuffer> out,
                   ffi::Result<ffi::AnyBuffer> lse, Attributes attributes) {
  Problem problem;
  const Arrays arrays{query, key, value, *out, *lse};
  if (ffi::Error error = decode(attributes, arrays, problem); error.failure()) return error;
  Device device;
  if (cudaError_t error = query_device(device); error != cudaSuccess)
    return failed("CUDA", cudaGetErrorString(error));
  const Sizes capability = attributes.compute_capability;
  if (capability[0] != device.major || capability[1] != device.minor) {
    return not_implemented(
        "a program runs on the generation that its tiles were chosen for; got tiles for " +
        text_of(capability) + " on a device of (" + std::to_string(device.major) + ", " +
        std::to_string(device.minor) + "): trace it with device= of this device");
  }
  ForwardArguments arguments{};
  arguments.problem = problem;
  arguments.dtype = dtype_of(query);
  arguments.query = query.untyped_data();
  arguments.key = key.untyped_data();
  arguments.value = value.untyped_data();
  arguments.out = out->untyped_data();
  arguments.lse = static_cast<float*>(lse->untyped_data());
  arguments.num_sms = device.num_sms;
  arguments.stream = stream;
  const bool is_hopper = device.major == kHopper.major;
  const char* reason = is_hopper ? launch_sm90_forward(arguments) : launch_sm100_forward(arguments);
  return reason == nullptr ? ffi::Error::Success()
                           : failed(is_hopper ? "Hopper kernel" : "Blackwell kernel", reason);
}

}  // namespace
}  // namespace gna

GNA_EXPORT XLA_FFI_Error* GnaForwardCuda(XLA_FFI_CallFrame* frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(GnaForwardCuda, gna::forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attrs<gna::Attributes>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
