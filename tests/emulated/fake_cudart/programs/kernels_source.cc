// The test kernels as g++ compiles them.
#include "kernel_registry.h"
#include "kernels.cuh"

namespace {
using fake_cuda::SourceKernel;
const SourceKernel<&scale_add> kScaleAdd;
const SourceKernel<&move_pair<Pair>> kMovePair;
const SourceKernel<&wait_flag> kWaitFlag;
const SourceKernel<&meet> kMeet;
const SourceKernel<&grid_meet> kGridMeet(512);
}  // namespace
