// What the backward pass leaves out of the gradient: biases before a batch norm, the rows of other
// steps, parameters on which the output does not depend.
#pragma once

#include "execution/elementwise.h"
#include "task_program/program/program.h"

namespace fastmeta {

// Copies short parts, one a row; without a source, zeros.
template <typename storage_t>
struct CopyParts {
  static constexpr int kMost = 8;
  static constexpr int64_t kLongest = 4096;  // elements
  Array<storage_t> source, target;
  Part parts[kMost];

  template <typename ThreadGroup>
  FASTMETA_HOST_DEVICE void operator()(const ThreadGroup& group, int64_t row) const {
    using number_t = typename ThreadGroup::number_t;
    const Part& part = parts[row];
    for (int64_t n = group.lane; n < part.count; n += group.size) {
      const int64_t i = part.begin + n;
      group.store(target, i, source ? group.load(source, i) : number_t(0));
    }
  }
};

// Copies source, or zeros without one, to the parts of target, the first `wanted` parameters, that
// backward() may not write.
template <typename Executor, typename storage_t>
FASTMETA_HOST_DEVICE void copy_unwritten(Executor& exec, const Program& program, int64_t wanted,
                                         Array<storage_t> source, Array<storage_t> target) {
  if (program.unwritten_count == 0) return;
  CopyParts<storage_t> together{source, target, {}};
  int count = 0;
  const auto copy_together = [&] {
    if (count > 0) exec.rows(count, together);
    count = 0;
  };
  for (int p = 0; p < program.unwritten_count; ++p) {
    const Part& part = program.unwritten[p];
    if (part.begin >= wanted) break;  // no part has both kinds of parameters
    if (part.count <= CopyParts<storage_t>::kLongest) {
      together.parts[count++] = part;
      if (count == CopyParts<storage_t>::kMost) copy_together();
    } else if (source) {
      exec.map(part.count, Copy<storage_t>{source.from(part.begin), target.from(part.begin)});
    } else {
      exec.map(part.count, Fill<storage_t>{0, target.from(part.begin)});
    }
  }
  copy_together();
}

}  // namespace fastmeta
