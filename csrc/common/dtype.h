// Element types of the CUDA kernels, for launchers that know no torch.
#pragma once

namespace fastmeta {

enum class Dtype { kFloat, kDouble, kHalf, kBfloat16 };

}  // namespace fastmeta
