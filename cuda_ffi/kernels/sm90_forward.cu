// The forward on Hopper, host side.
#include "sm90_forward.h"
#include "start.h"

namespace gna {

const char* launch_sm90_forward(const ForwardArguments& arguments) {
  if (const char* reason = refusal(arguments, sm90::kTileRows, sm90::kKeys)) return reason;
  return launch_instance<sm90::Kernel, cutlass::bfloat16_t, cutlass::half_t>(
      arguments, sm90::kParts, [&](auto& params) {
        params.epilogue.lse = arguments.lse;
        // Factor of out, which the example has for dropout.
        params.mainloop.rp_dropout = 1.0f;
      });
}

}  // namespace gna
