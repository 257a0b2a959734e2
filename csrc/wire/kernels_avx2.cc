// The kernels for AVX2 and F16C; compiled with those flags (CMakeLists.txt). Empty elsewhere.
#if defined(__x86_64__)
#include "wire/kernels.h"
#include "wire/vector_avx2.h"

namespace dpcomm {

constinit const KernelTable kAvx2Kernels = kernel_table<Avx2>();

}  // namespace dpcomm
#endif
