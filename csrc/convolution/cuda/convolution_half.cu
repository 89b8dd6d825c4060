// Kernels of the half types, in a file of their own so that both files compile at once.
#include "convolution/cuda/convolution_kernel.cuh"

namespace fastmeta {

template LaunchedConvolution<__half> launch_convolution(const Convolution<__half>&, int64_t,
                                                        int64_t, float*, bool, cudaStream_t);
template LaunchedConvolution<__nv_bfloat16> launch_convolution(const Convolution<__nv_bfloat16>&,
                                                               int64_t, int64_t, float*, bool,
                                                               cudaStream_t);

}  // namespace fastmeta
