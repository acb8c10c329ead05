// The forward on Blackwell, host side.
#include "sm100_forward.h"
#include "start.h"

namespace gna {

const char* launch_sm100_forward(const ForwardArguments& arguments) {
  if (const char* reason = refusal(arguments, sm100::kTileRows, sm100::kKeys)) return reason;
  return launch_instance<sm100::Kernel, cutlass::bfloat16_t, cutlass::half_t,
                         cutlass::float_e4m3_t>(arguments, sm100::kParts, [&](auto& params) {
    params.mainloop.lse = arguments.lse;
    params.mainloop.scale_output = 1.0f;
    // One key: the example takes another way where there is none.
    const Problem& problem = arguments.problem;
    const int rows = static_cast<int>(num_jobs(problem)) * sm100::kTileRows;
    params.problem_shape = sm100::JobsShape{rows, 1, problem.head_dim, {{1, 1}, 1}};
  });
}

}  // namespace gna
