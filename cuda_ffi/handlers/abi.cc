#include "abi.h"

// Given by the build.
const char* gna_sources() { return GNA_SOURCES; }

int gna_ffi_version() { return 1000 * XLA_FFI_API_MAJOR + XLA_FFI_API_MINOR; }
