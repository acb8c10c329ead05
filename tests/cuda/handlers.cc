// The stand-in for the built library, for `cuda_backend_test.py`: the handler for the CPU, the same
// under the name of the one for CUDA, and `decode` of arrays that no test can allocate.
#include "handlers/forward_cpu.cc"

GNA_EXPORT XLA_FFI_Error* GnaForwardCuda(XLA_FFI_CallFrame* frame) { return GnaForwardCpu(frame); }

// What `decode` says of query, key, value and out [batch, rows, 1, dilation, 1, 64], one token per
// dilation group of the last axis, that start `offset` bytes after a multiple of 16; empty where it
// takes them. No memory is read.
static const char* decoded(int64_t batch, int64_t rows, int64_t dilation, int64_t offset) {
  alignas(16) static char memory[64];
  int64_t shape[] = {batch, rows, 1, dilation, 1, 64}, layout[] = {rows, 1, dilation};
  int64_t one[] = {1, 1, 1}, no[] = {0, 0, 0}, dilations[] = {1, 1, dilation};
  int64_t tile[] = {128, 1, 1}, hopper[] = {9, 0};
  XLA_FFI_Buffer tokens{};
  tokens.dtype = XLA_FFI_DataType_BF16;
  tokens.data = memory + offset;
  tokens.rank = 6;
  tokens.dims = shape;
  XLA_FFI_Buffer rows_of_lse = tokens;
  rows_of_lse.dtype = XLA_FFI_DataType_F32;
  rows_of_lse.rank = 5;
  const xla::ffi::AnyBuffer array(&tokens), lse(&rows_of_lse);
  using gna::Sizes;
  const gna::Attributes attributes{Sizes(layout, 3),    Sizes(one, 3),    Sizes(one, 3),
                                   Sizes(dilations, 3), Sizes(no, 3),     Sizes(tile, 3),
                                   Sizes(tile, 3),      Sizes(hopper, 2), 1.0f};
  gna::Problem problem;
  static std::string message;
  message = gna::decode(attributes, {array, array, array, array, lse}, problem).message();
  return message.c_str();
}

GNA_EXPORT const char* decode_misaligned(int64_t offset) { return decoded(1, 8, 1, offset); }

GNA_EXPORT const char* decode_large(int64_t batch, int64_t rows, int64_t dilation) {
  return decoded(batch, rows, dilation, 0);
}
