// A call as XLA hands it over, checked and decoded into a `gna::Problem`: what every handler does
// first, whatever its platform.
//
// The wording of errors is that of the Python checks (`gna_jax.neighborhood`, `gna_jax.problem`):
// rule, got, way out. Whoever calls through `gna_jax` has passed those and never sees these; a
// program exported elsewhere, or a call of the bare FFI target, may. INVALID_ARGUMENT is what is
// never legal, UNIMPLEMENTED what these kernels cannot. No CUDA here.
#ifndef GNA_HANDLERS_DECODE_H_
#define GNA_HANDLERS_DECODE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>

#include "gna/tiling.h"
#include "xla/ffi/api/ffi.h"

namespace gna {

namespace ffi = xla::ffi;
using Sizes = ffi::Span<const int64_t>;

// A GPU generation that has a kernel: CUDA's compute capability, the queries of a tile, and whether
// operands may be float8_e4m3fn.
struct Generation {
  const char* name;
  int64_t major, minor;
  int64_t q_tile_tokens;
  bool takes_float8;
};
constexpr Generation kHopper{"Hopper", 9, 0, 128, false};
constexpr Generation kBlackwell{"Blackwell", 10, 0, 256, true};
// Keys of a KV tile: the columns of one product of scores.
constexpr int64_t kKvTileTokens = 128;
// Tokens of an axis: two positions add up in 32 bits.
constexpr int64_t kLongestAxis = int64_t{1} << 30;
// Tokens per axis of a TMA box.
constexpr int64_t kLongestBoxSide = 256;
// `window_size` of an axis on which a query sees its whole dilation group.
constexpr int64_t kWholeGroup = -1;

// The static side of a call. Sizes are one per spatial axis, as in Python. `layout` is the tokens
// that exist: in arrays every axis is rounded up to a multiple of its dilation (gna/boxes.h).
// `compute_capability` (major, minor) is that of the device the tiles were chosen for.
struct Attributes {
  Sizes layout, window_size, stride, dilation, is_causal, q_tile, kv_tile, compute_capability;
  float scale;
};

// Query, out [.., B, *space, N, H] and key, value [.., B, *space, K, H] in one 16-bit dtype, or
// operands in float8_e4m3fn and out in bfloat16; lse [.., B, *space, N] float32. Axes before the
// batch are what `jax.vmap` adds; they count as batch.
struct Arrays {
  ffi::AnyBuffer query, key, value, out, lse;
};

// Sizes as Python writes them: "(30, 48)", "(30,)".
inline std::string text_of(Sizes sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

inline std::string text_of(ffi::AnyBuffer array) { return text_of(array.dimensions()); }

// A dtype as numpy names it, for those that an array of attention may have by mistake.
inline std::string name_of(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::BF16:
      return "bfloat16";
    case ffi::DataType::F16:
      return "float16";
    case ffi::DataType::F8E4M3FN:
      return "float8_e4m3fn";
    case ffi::DataType::F32:
      return "float32";
    case ffi::DataType::F64:
      return "float64";
    default:
      return "XLA's element type " + std::to_string(static_cast<int>(dtype));
  }
}

inline ffi::Error never_legal(std::string message) {
  return ffi::Error::InvalidArgument("gna_jax_forward: " + std::move(message));
}

inline ffi::Error not_implemented(std::string message) {
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "gna_jax_forward: " + std::move(message));
}

// A call while it is checked.
struct Call {
  const Attributes& attributes;
  const Arrays& arrays;

  int64_t rank() const { return static_cast<int64_t>(attributes.layout.size()); }
  // Axes before the layout: what vmap has added, and batch.
  int64_t leading() const {
    return static_cast<int64_t>(arrays.query.dimensions().size()) - rank() - 2;
  }
  // Tokens of an axis in memory.
  int64_t stored_length(int64_t axis) const {
    const int64_t dilation = attributes.dilation[axis];
    return (attributes.layout[axis] + dilation - 1) / dilation * dilation;
  }
  int64_t query_heads() const { return arrays.query.dimensions()[leading() + rank()]; }
  int64_t kv_heads() const { return arrays.key.dimensions()[leading() + rank()]; }
  int64_t head_dim() const { return arrays.query.dimensions().back(); }
  // The generation that the call was made for; nullptr where it has no kernel.
  const Generation* generation() const {
    const Sizes got = attributes.compute_capability;
    for (const Generation* one : {&kHopper, &kBlackwell}) {
      if (got.size() == 2 && got[0] == one->major && got[1] == one->minor) return one;
    }
    return nullptr;
  }
  std::string got_shapes() const {
    return "got query " + text_of(arrays.query) + ", key " + text_of(arrays.key) + ", value " +
           text_of(arrays.value);
  }
};

inline ffi::Error check_attributes(const Call& call) {
  const Attributes& a = call.attributes;
  if (call.rank() < 1 || call.rank() > kMaxRank) {
    return never_legal("layout must have 1 to 3 spatial axes; got layout " + text_of(a.layout) +
                       "; fold further axes into the batch");
  }
  const struct {
    const char* name;
    Sizes sizes;
  } all[] = {{"window_size", a.window_size}, {"stride", a.stride}, {"dilation", a.dilation},
             {"is_causal", a.is_causal},     {"q_tile", a.q_tile}, {"kv_tile", a.kv_tile}};
  for (const auto& one : all) {
    if (one.sizes.size() != a.layout.size()) {
      return never_legal(std::string(one.name) + " must be one per spatial axis; got " + one.name +
                         "=" + text_of(one.sizes) + " for " + std::to_string(call.rank()) +
                         " spatial axes");
    }
  }
  for (int64_t flag : a.is_causal) {
    if (flag != 0 && flag != 1) {
      return never_legal("is_causal must be 0 or 1 on every axis; got is_causal=" +
                         text_of(a.is_causal));
    }
  }
  if (call.generation() == nullptr) {
    return not_implemented(
        "the CUTLASS kernels run on compute capability 9.0 (Hopper) and 10.0 (Blackwell); got " +
        text_of(a.compute_capability) + ": name such a device, or use 'xla'");
  }
  if (!std::isfinite(a.scale)) {
    return never_legal("scale must be finite; got scale=" + std::to_string(a.scale));
  }
  // Unseen keys weigh exp(scale * -inf).
  if (a.scale <= 0.0f) {
    return not_implemented("the CUTLASS kernels take a positive scale; got scale=" +
                           std::to_string(a.scale) + ": scale the query instead, or use 'mosaic'");
  }
  return ffi::Error::Success();
}

// As `Neighborhood._check` and `Neighborhood.check_layout`.
inline ffi::Error check_neighborhood(const Call& call) {
  const Attributes& a = call.attributes;
  const Sizes layout = a.layout;
  for (int64_t length : layout) {
    if (length < 1) {
      return never_legal("no axis of layout may be empty; got layout " + text_of(layout));
    }
    if (length > kLongestAxis) {
      return not_implemented("the CUTLASS kernels take up to " + std::to_string(kLongestAxis) +
                             " tokens per axis; got layout " + text_of(layout) +
                             ": use slabs of it, or 'xla'");
    }
  }
  for (int64_t window : a.window_size) {
    if (window < 1 && window != kWholeGroup) {
      return never_legal(
          "window_size must be at least 1, or -1 for the whole axis; got window_size=" +
          text_of(a.window_size));
    }
  }
  for (int64_t stride : a.stride) {
    if (stride < 1) {
      return never_legal("stride must be at least 1; got stride=" + text_of(a.stride));
    }
  }
  for (int64_t dilation : a.dilation) {
    if (dilation < 1) {
      return never_legal("dilation must be at least 1; got dilation=" + text_of(a.dilation));
    }
  }
  for (int64_t axis = 0; axis < call.rank(); ++axis) {
    if (a.window_size[axis] != kWholeGroup && a.stride[axis] > a.window_size[axis]) {
      return never_legal(
          "stride must not exceed window_size on any axis, or some keys would be seen by no query; "
          "got stride=" +
          text_of(a.stride) + ", window_size=" + text_of(a.window_size) +
          "; stride = window_size is blocked attention");
    }
  }
  const std::string got = "got window_size=" + text_of(a.window_size) +
                          ", dilation=" + text_of(a.dilation) + ", layout " + text_of(layout);
  for (int64_t axis = 0; axis < call.rank(); ++axis) {
    const int64_t window = a.window_size[axis], dilation = a.dilation[axis], length = layout[axis];
    if (window == kWholeGroup) {
      if (dilation > length || a.stride[axis] > length / dilation) {
        return never_legal(
            "a dilation group of the layout must hold at least `stride` tokens (stride=" +
            text_of(a.stride) + "); " + got + "; use a smaller stride or dilation");
      }
    } else if (window > length) {
      return never_legal("window_size must not exceed the layout on any axis; " + got +
                         "; use a smaller window, or -1 for every key of the axis");
    } else if (dilation > length / window) {
      return never_legal(
          "window_size * dilation must not exceed the layout on any axis; " + got +
          "; use a smaller window or dilation, or pad the layout to window_size * dilation");
    }
  }
  return ffi::Error::Success();
}

// Of out, for operands of a dtype. As `Problem.out_dtype`.
inline ffi::DataType out_dtype(ffi::DataType operands) {
  return operands == ffi::DataType::F8E4M3FN ? ffi::DataType::BF16 : operands;
}

inline ffi::Error check_dtypes(const Call& call) {
  const Arrays& arrays = call.arrays;
  const ffi::DataType dtype = arrays.query.element_type();
  const bool is_float8 = dtype == ffi::DataType::F8E4M3FN;
  if (is_float8 ? !call.generation()->takes_float8
                : dtype != ffi::DataType::BF16 && dtype != ffi::DataType::F16) {
    return not_implemented(
        "the CUTLASS kernels take bfloat16 and float16, on Blackwell float8_e4m3fn too; got " +
        name_of(dtype) + " on " + call.generation()->name + ": cast the operands, or use 'xla'");
  }
  const struct {
    const char* name;
    ffi::AnyBuffer array;
  } others[] = {{"key", arrays.key}, {"value", arrays.value}};
  for (const auto& other : others) {
    if (other.array.element_type() != dtype) {
      return never_legal(std::string(other.name) + " must have query's dtype; got query of " +
                         name_of(dtype) + ", " + other.name + " of " +
                         name_of(other.array.element_type()));
    }
  }
  if (arrays.out.element_type() != out_dtype(dtype)) {
    return never_legal("out must have query's dtype, or bfloat16 for float8_e4m3fn; got query of " +
                       name_of(dtype) + ", out of " + name_of(arrays.out.element_type()));
  }
  if (arrays.lse.element_type() != ffi::DataType::F32) {
    return never_legal("lse must be float32; got lse of " + name_of(arrays.lse.element_type()));
  }
  return ffi::Error::Success();
}

// As `gna_jax.problem._check_shapes`, and out and lse like query.
inline ffi::Error check_shapes(const Call& call) {
  const Arrays& arrays = call.arrays;
  const Sizes query = arrays.query.dimensions(), key = arrays.key.dimensions(),
              value = arrays.value.dimensions();
  const std::string got = call.got_shapes();
  const int64_t rank = call.rank();
  if (call.leading() < 1) {
    return never_legal("query must be [batch, *space, heads, head_dim] with " +
                       std::to_string(rank) + " spatial axes; got query of shape " +
                       text_of(query));
  }
  if (key.size() != query.size() || value.size() != query.size()) {
    return never_legal("query, key and value must have the same number of axes; " + got);
  }
  for (int64_t i = 0; i < call.leading(); ++i) {
    if (key[i] != query[i] || value[i] != query[i]) {
      return never_legal("query, key and value must agree in batch; " + got);
    }
  }
  for (int64_t i = call.leading(); i < call.leading() + rank; ++i) {
    if (key[i] != value[i]) {
      return never_legal("key and value must agree in layout (their spatial axes); " + got);
    }
    if (key[i] != query[i]) {
      return never_legal("query and key must agree in layout (their spatial axes); " + got);
    }
  }
  for (int64_t axis = 0; axis < rank; ++axis) {
    if (query[call.leading() + axis] != call.stored_length(axis)) {
      return never_legal(
          "query, key and value must hold the layout, every axis rounded up to a multiple of its "
          "dilation; " +
          got + ", layout " + text_of(call.attributes.layout) + ", dilation=" +
          text_of(call.attributes.dilation) + "; pad them with zeros at the end of the axis");
    }
  }
  if (key.back() != query.back()) {
    return never_legal("query and key must agree in head_dim (last axis); " + got);
  }
  if (key[key.size() - 2] != value[value.size() - 2]) {
    return never_legal("key and value must agree in heads (axis -2); " + got);
  }
  for (const Sizes& shape : {query, key, value}) {
    for (int64_t size : shape) {
      if (size < 1) return never_legal("no axis of query, key or value may be empty; " + got);
    }
  }
  if (call.query_heads() % call.kv_heads() != 0) {
    return never_legal("key/value heads must divide query heads; got " +
                       std::to_string(call.query_heads()) + " query heads, " +
                       std::to_string(call.kv_heads()) + " key/value heads");
  }
  if (value.back() != query.back() || (query.back() != 64 && query.back() != 128)) {
    return not_implemented(
        "the CUTLASS kernels take head dims 64 and 128, the same for query and value; got "
        "head_dim=" +
        std::to_string(query.back()) + ", value_dim=" + std::to_string(value.back()) +
        ": pad the heads with zeros");
  }
  return ffi::Error::Success();
}

inline ffi::Error check_results(const Call& call) {
  const Sizes query = call.arrays.query.dimensions(), out = call.arrays.out.dimensions();
  const Sizes lse = call.arrays.lse.dimensions();
  bool agree = out.size() == query.size() && lse.size() + 1 == query.size();
  for (size_t i = 0; agree && i < query.size(); ++i) {
    agree = out[i] == query[i] && (i == lse.size() || lse[i] == query[i]);
  }
  if (agree) return ffi::Error::Success();
  return never_legal("out must have query's shape, and lse the same without head_dim; got query " +
                     text_of(query) + ", out " + text_of(out) + ", lse " + text_of(lse));
}

// What is counted in 32 bits: batch entries; the coordinates of a tensor copy that several axes
// share (see gna/boxes.h).
inline ffi::Error check_sizes(const Call& call) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const Sizes query = call.arrays.query.dimensions();
  // Factors are below 2^31, so a product that is still below it can take one more.
  int64_t rows = 1, columns = 1;
  for (int64_t i = 0; i < call.leading() + std::min<int64_t>(call.rank(), 2); ++i) {
    if (rows <= kMost) rows *= query[i];
  }
  const int64_t dilation = call.rank() == kMaxRank ? call.attributes.dilation.back() : 1;
  for (int64_t size : {dilation, call.query_heads(), call.head_dim()}) {
    if (columns <= kMost) columns *= size;
  }
  if (rows <= kMost && columns <= kMost) return ffi::Error::Success();
  return not_implemented(
      "the CUTLASS kernels count rows of tokens (batch and the first two axes), and columns of all "
      "heads, in 32 bits; " +
      call.got_shapes() + ": split the batch");
}

// Tensor copies read and write units of 16 bytes.
inline ffi::Error check_alignment(const Call& call) {
  const Arrays& arrays = call.arrays;
  for (const ffi::AnyBuffer& array :
       {arrays.query, arrays.key, arrays.value, arrays.out, arrays.lse}) {
    if (reinterpret_cast<uintptr_t>(array.untyped_data()) % 16 != 0) {
      return never_legal("arrays must start at a multiple of 16 bytes; " + call.got_shapes());
    }
  }
  return ffi::Error::Success();
}

inline ffi::Error check_tiles(const Call& call) {
  const Attributes& a = call.attributes;
  const std::string got = "got q=" + text_of(a.q_tile) + ", kv=" + text_of(a.kv_tile);
  int64_t q_tokens = 1, kv_tokens = 1;
  for (int64_t axis = 0; axis < call.rank(); ++axis) {
    for (int64_t size : {a.q_tile[axis], a.kv_tile[axis]}) {
      if (size < 1 || size > kLongestBoxSide || (size & (size - 1)) != 0) {
        return not_implemented("tile sizes are powers of two up to " +
                               std::to_string(kLongestBoxSide) + " per axis; " + got);
      }
    }
    q_tokens *= a.q_tile[axis];
    kv_tokens *= a.kv_tile[axis];
  }
  const Generation& generation = *call.generation();
  if (q_tokens != generation.q_tile_tokens) {
    return not_implemented(std::string("on ") + generation.name + " tiles.q has " +
                           std::to_string(generation.q_tile_tokens) + " tokens, not " +
                           std::to_string(q_tokens) + "; " + got);
  }
  if (kv_tokens != kKvTileTokens) {
    return not_implemented(std::string("on ") + generation.name + " tiles.kv has " +
                           std::to_string(kKvTileTokens) + " tokens, not " +
                           std::to_string(kv_tokens) + "; " + got);
  }
  return ffi::Error::Success();
}

// Checks a call, and fills `problem` where all is right.
inline ffi::Error decode(const Attributes& attributes, const Arrays& arrays, Problem& problem) {
  const Call call{attributes, arrays};
  // In this order: a check may rely on those before it.
  for (auto check : {check_attributes, check_neighborhood, check_dtypes, check_shapes,
                     check_results, check_sizes, check_alignment, check_tiles}) {
    if (ffi::Error error = check(call); error.failure()) return error;
  }
  problem = Problem{};
  problem.rank = static_cast<int>(call.rank());
  for (int axis = 0; axis < problem.rank; ++axis) {
    const int64_t length = attributes.layout[axis], dilation = attributes.dilation[axis];
    const int64_t window = attributes.window_size[axis];
    Axis& rule = problem.axes[axis];
    rule.length = static_cast<int>(length);
    rule.window =
        static_cast<int>(window == kWholeGroup ? (length + dilation - 1) / dilation : window);
    rule.stride = static_cast<int>(attributes.stride[axis]);
    rule.dilation = static_cast<int>(dilation);
    rule.is_causal = attributes.is_causal[axis] != 0;
    rule.q_tile = static_cast<int>(attributes.q_tile[axis]);
    rule.kv_tile = static_cast<int>(attributes.kv_tile[axis]);
  }
  for (int64_t i = 0; i < call.leading(); ++i) {
    problem.batch *= static_cast<int>(arrays.query.dimensions()[i]);
  }
  problem.query_heads = static_cast<int>(call.query_heads());
  problem.kv_heads = static_cast<int>(call.kv_heads());
  problem.head_dim = static_cast<int>(call.head_dim());
  problem.scale = attributes.scale;
  // The rows of all jobs are counted in 32 bits.
  const int64_t rows = num_jobs(problem) * call.generation()->q_tile_tokens;
  if (rows > std::numeric_limits<int32_t>::max()) {
    return not_implemented(
        "the CUTLASS kernels take less than 2^31 queries of all samples and heads, tiles filled "
        "up; got " +
        std::to_string(rows) + ", " + call.got_shapes() + ": split the batch");
  }
  return ffi::Error::Success();
}

}  // namespace gna

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    gna::Attributes, StructMember<gna::Sizes>("layout"), StructMember<gna::Sizes>("window_size"),
    StructMember<gna::Sizes>("stride"), StructMember<gna::Sizes>("dilation"),
    StructMember<gna::Sizes>("is_causal"), StructMember<gna::Sizes>("q_tile"),
    StructMember<gna::Sizes>("kv_tile"), StructMember<gna::Sizes>("compute_capability"),
    StructMember<float>("scale"));

#endif  // GNA_HANDLERS_DECODE_H_
