// Marks functions that a CPU and a CUDA kernel share.
#pragma once

#ifdef __CUDACC__
#define FASTMETA_HOST_DEVICE __host__ __device__
#else
#define FASTMETA_HOST_DEVICE
#endif

// Forces inlining of a function of a constant argument: g++ keeps a function out of line if it is
// long before the constant is put in.
#ifdef __CUDACC__
#define FASTMETA_ALWAYS_INLINE
#else
#define FASTMETA_ALWAYS_INLINE [[gnu::always_inline]] inline
#endif
