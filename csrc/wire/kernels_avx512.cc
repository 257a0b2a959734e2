// The kernels for AVX-512 F, BW, DQ and VL; compiled with those flags (CMakeLists.txt). Empty
// elsewhere.
#if defined(__x86_64__)
#include "wire/kernels.h"
#include "wire/vector_avx512.h"

namespace dpcomm {

constinit const KernelTable kAvx512Kernels = kernel_table<Avx512>();

}  // namespace dpcomm
#endif
