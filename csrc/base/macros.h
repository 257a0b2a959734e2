// Marks for code that both the host compiler and nvcc read.
#pragma once

#if defined(__CUDACC__)
#define DPCOMM_HD __host__ __device__
/// Before a loop: its iterations one after the other without a jump, so that arrays can lie in
/// registers; or a loop that stays one.
#define DPCOMM_UNROLL _Pragma("unroll")
#define DPCOMM_NO_UNROLL _Pragma("unroll 1")
#else
#define DPCOMM_HD
#define DPCOMM_UNROLL
#define DPCOMM_NO_UNROLL
#endif
