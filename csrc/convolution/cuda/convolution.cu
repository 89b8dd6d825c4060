#include "convolution/cuda/convolution_kernel.cuh"

namespace fastmeta {

template LaunchedConvolution<float> launch_convolution(const Convolution<float>&, int64_t, int64_t,
                                                       float*, bool, cudaStream_t);
template LaunchedConvolution<double> launch_convolution(const Convolution<double>&, int64_t,
                                                        int64_t, double*, bool, cudaStream_t);

}  // namespace fastmeta
