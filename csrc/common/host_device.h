// Marks what a CPU and a CUDA kernel share.
#pragma once

#ifdef __CUDACC__
#define FASTMETA_HOST_DEVICE __host__ __device__
#else
#define FASTMETA_HOST_DEVICE
#endif
