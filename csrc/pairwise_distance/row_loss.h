// What losses over distances to rows share on every device.
#pragma once

#include "common/host_device.h"

namespace fastmeta {

// The upstream of a distance, of the derivative of a query's loss in the logit -scale d.
template <typename value_t>
FASTMETA_HOST_DEVICE inline value_t loss_upstream(value_t scale, value_t weight,
                                                  value_t derivative) {
  return -scale * weight * derivative;
}

}  // namespace fastmeta
