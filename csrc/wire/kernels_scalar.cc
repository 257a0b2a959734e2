// The reference kernels, for any CPU.
#include "wire/kernels.h"

namespace dpcomm {

constinit const KernelTable kScalarKernels = kernel_table<Scalar>();

}  // namespace dpcomm
