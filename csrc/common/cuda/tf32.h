// Operations whose float operands may be rounded to TF32, 10 bits of mantissa.
#pragma once

namespace fastmeta {

struct Tf32 {
  bool convolutions = false, products = false;
};

}  // namespace fastmeta
