// What the built library says of itself, and how its symbols are seen: read by
// `cuda_ffi/library.py` before anything is called.
#ifndef GNA_HANDLERS_ABI_H_
#define GNA_HANDLERS_ABI_H_

#include "xla/ffi/api/c_api.h"

// The library is built with hidden visibility: these symbols alone are seen.
#define GNA_EXPORT extern "C" __attribute__((visibility("default")))

// Fingerprint of the sources that it was built from; `library.fingerprint` computes the same.
GNA_EXPORT const char* gna_sources();
// Version of XLA's FFI that it was built for: 1000 * major + minor.
GNA_EXPORT int gna_ffi_version();

#endif  // GNA_HANDLERS_ABI_H_
