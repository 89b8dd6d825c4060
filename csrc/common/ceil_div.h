#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace fastmeta {

FASTMETA_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastmeta
