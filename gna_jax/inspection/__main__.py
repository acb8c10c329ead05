"""The process that compiles one kernel: `python -m gna_jax.inspection JSON`, started by `compile.compile_kernel` alone.

JSON holds the fields of a `Call` ("call"), the kernel's name ("kernel") and a folder that exists ("folder").
"""

import json
import sys
from pathlib import Path

from gna_jax.inspection.call import Call
from gna_jax.inspection.compile import compile_here

if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    compile_here(Call.from_json(request["call"]), request["kernel"], Path(request["folder"]))
