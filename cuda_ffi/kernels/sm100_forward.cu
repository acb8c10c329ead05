// The forward on Blackwell, host side: tensor maps and launch.
#include "sm100_forward.h"
#include "start.h"

namespace gna {
namespace {

template <class Element, int kHeadDim>
const char* launch(const ForwardArguments& arguments) {
  using Kernel = sm100::Kernel<Element, kHeadDim>;
  const Problem& problem = arguments.problem;
  if (const char* reason = refusal(arguments, sm100::kTileRows, sm100::kKeys)) return reason;
  typename Kernel::Params params{};
  auto& mainloop = params.mainloop;
  auto& epilogue = params.epilogue;
  mainloop.problem = epilogue.problem = problem;
  mainloop.scale_softmax = problem.scale;
  mainloop.scale_softmax_log2 = static_cast<float>(kLog2E * problem.scale);
  mainloop.scale_output = 1.0f;
  mainloop.lse = arguments.lse;
  // One key: the example takes another way where there is none.
  params.problem_shape = sm100::JobsShape{
      static_cast<int>(num_jobs(problem)) * sm100::kTileRows, 1, kHeadDim, {{1, 1}, 1}};
  params.tile_scheduler = schedule<cutlass::fmha::kernel::PersistentTileScheduler>(arguments);

  const PerAxis part = part_shape(q_tile(problem), sm100::kParts);
  const auto make_map = [&](CUtensorMap& map, const void* array, int heads, const PerAxis& box) {
    return encode(map, problem, array, arguments.is_bfloat16, heads, box);
  };
  if (!make_map(mainloop.query, arguments.query, problem.query_heads, part) ||
      !make_map(mainloop.key, arguments.key, problem.kv_heads, kv_tile(problem)) ||
      !make_map(mainloop.value, arguments.value, problem.kv_heads, kv_tile(problem)) ||
      !make_map(epilogue.out, arguments.out, problem.query_heads, part)) {
    return kNoTensorMap;
  }
  return start<Kernel>(params, arguments.stream);
}

}  // namespace

const char* launch_sm100_forward(const ForwardArguments& arguments) {
  if (arguments.is_bfloat16) {
    return arguments.problem.head_dim == 128 ? launch<cutlass::bfloat16_t, 128>(arguments)
                                             : launch<cutlass::bfloat16_t, 64>(arguments);
  }
  return arguments.problem.head_dim == 128 ? launch<cutlass::half_t, 128>(arguments)
                                           : launch<cutlass::half_t, 64>(arguments);
}

}  // namespace gna
