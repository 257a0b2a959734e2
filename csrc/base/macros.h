// Marks for code that both the host compiler and nvcc read.
#pragma once

#if defined(__CUDACC__)
#define DPCOMM_HD __host__ __device__
#else
#define DPCOMM_HD
#endif
