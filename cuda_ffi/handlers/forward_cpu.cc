// The forward on the host, for tests alone: the CUDA handler's checks, and the attention computed
// naively, with the window rule of `gna/neighborhood.h` and sums in float. Tokens past the layout,
// of which a kernel promises nothing, are NaN, so that whoever uses them sees it.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "abi.h"
#include "decode.h"
#include "gna/boxes.h"
#include "gna/neighborhood.h"

namespace gna {
namespace {

struct BFloat16 {
  uint16_t bits;
  explicit operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  // Rounds to nearest, ties to even; no value here is infinite.
  static BFloat16 of(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    if (std::isnan(value)) return {0x7fc0};
    return {static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
  }
};

struct Float16 {
  _Float16 value;
  explicit operator float() const { return static_cast<float>(value); }
  static Float16 of(float value) { return {static_cast<_Float16>(value)}; }
};

// float8_e4m3fn: 4 bits of exponent, 3 of mantissa; no infinity, and one NaN per sign.
struct Float8 {
  uint8_t bits;
  explicit operator float() const {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    if (exponent == 15 && mantissa == 7) return std::numeric_limits<float>::quiet_NaN();
    const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                     : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    return bits >> 7 ? -size : size;
  }
};

// Positions on an axis that the query at `position` sees.
std::vector<int64_t> seen(const Axis& axis, int64_t position) {
  const int residue = static_cast<int>(position % axis.dilation);
  const int length = group_length(axis.length, axis.dilation, residue);
  const Interval interval = keys(axis, static_cast<int>(position / axis.dilation), length);
  std::vector<int64_t> positions;
  for (int64_t place = interval.first; place < interval.end; ++place) {
    positions.push_back(residue + place * axis.dilation);
  }
  return positions;
}

// Tokens per axis in memory.
PerAxis stored_layout(const Problem& problem) {
  const Axis* axes = problem.axes;
  return {{stored_length(axes[0]), stored_length(axes[1]), stored_length(axes[2])}};
}

// Numbers in memory of the tokens that the query at a position sees; none past the layout.
std::vector<int64_t> seen_tokens(const Problem& problem, const PerAxis& position) {
  const Axis* axes = problem.axes;
  const PerAxis stored = stored_layout(problem);
  std::vector<int64_t> all;
  for (int axis = 0; axis < kMaxRank; ++axis) {
    if (position[axis] >= axes[axis].length) return all;
  }
  for (int64_t z : seen(axes[0], position[0])) {
    for (int64_t y : seen(axes[1], position[1])) {
      for (int64_t x : seen(axes[2], position[2])) {
        all.push_back((z * stored[1] + y) * stored[2] + x);
      }
    }
  }
  return all;
}

template <typename Number, typename Out>
struct Forward {
  const Problem& problem;
  const Number *query, *key, *value;
  Out* out;
  float* lse;

  void run() const {
    const PerAxis stored = stored_layout(problem);
    const int num_tokens = volume(stored);
    for (int token = 0; token < num_tokens; ++token) {
      const std::vector<int64_t> keys = seen_tokens(problem, digits(token, stored));
      for (int entry = 0; entry < problem.batch; ++entry) {
        const int64_t first = static_cast<int64_t>(entry) * num_tokens;
        for (int head = 0; head < problem.query_heads; ++head) attend(first, token, head, keys);
      }
    }
  }

  // One query of one head, NaN where it sees no key; `first` is the batch entry's first token.
  void attend(int64_t first, int64_t token, int head, const std::vector<int64_t>& keys) const {
    const int dim = problem.head_dim, own_head = kv_head(problem, head);
    const int64_t row = (first + token) * problem.query_heads + head;
    std::vector<float> scores, sum(dim, 0.0f);
    float peak = -std::numeric_limits<float>::infinity(), total = 0.0f;
    for (int64_t other : keys) {
      const Number* columns = key + ((first + other) * problem.kv_heads + own_head) * dim;
      float score = 0.0f;
      for (int i = 0; i < dim; ++i) {
        score += static_cast<float>(query[row * dim + i]) * static_cast<float>(columns[i]);
      }
      scores.push_back(score * problem.scale);
      peak = std::fmax(peak, scores.back());
    }
    for (size_t i = 0; i < keys.size(); ++i) {
      const Number* columns = value + ((first + keys[i]) * problem.kv_heads + own_head) * dim;
      const float weight = std::exp(scores[i] - peak);
      total += weight;
      for (int j = 0; j < dim; ++j) sum[j] += weight * static_cast<float>(columns[j]);
    }
    for (int i = 0; i < dim; ++i) out[row * dim + i] = Out::of(sum[i] / total);
    lse[row] = keys.empty() ? std::numeric_limits<float>::quiet_NaN() : peak + std::log(total);
  }
};

template <typename Number, typename Out = Number>
void run(const Problem& problem, const Arrays& arrays) {
  const auto operand = [](const ffi::AnyBuffer& array) {
    return static_cast<const Number*>(array.untyped_data());
  };
  Forward<Number, Out>{problem,
                       operand(arrays.query),
                       operand(arrays.key),
                       operand(arrays.value),
                       static_cast<Out*>(arrays.out.untyped_data()),
                       static_cast<float*>(arrays.lse.untyped_data())}
      .run();
}

ffi::Error forward(ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value,
                   ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> lse,
                   Attributes attributes) {
  Problem problem;
  const Arrays arrays{query, key, value, *out, *lse};
  if (ffi::Error error = decode(attributes, arrays, problem); error.failure()) return error;
  switch (query.element_type()) {
    case ffi::DataType::BF16:
      run<BFloat16>(problem, arrays);
      break;
    case ffi::DataType::F16:
      run<Float16>(problem, arrays);
      break;
    default:
      run<Float8, BFloat16>(problem, arrays);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace gna

GNA_EXPORT XLA_FFI_Error* GnaForwardCpu(XLA_FFI_CallFrame* frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(GnaForwardCpu, gna::forward,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attrs<gna::Attributes>());
