// CPU implementation of nearest: threads own blocks of rows of x, or tasks if there are many.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "common/ceil_div.h"
#include "common/cpu/parallel.h"
#include "common/cpu/widen.h"
#include "nearest/arguments.h"
#include "nearest/search_cpu.h"

namespace fastmeta {
namespace {

// Distances and indices [Q, k] of a task.
template <typename scalar_t>
struct Target {
  scalar_t* distances;
  int64_t* indices;
  int64_t k;
};

// Rows of y that a task has.
template <typename scalar_t>
class PresentRows {
 public:
  // `present`: [rows] or null for all of them.
  PresentRows(const scalar_t* y, const bool* present, int64_t rows, int64_t features)
      : data_(y), count_(rows) {
    if (present == nullptr) return;
    for (int64_t j = 0; j < rows; ++j) {
      if (!present[j]) continue;
      indices_.push_back(j);
      copy_.insert(copy_.end(), y + j * features, y + (j + 1) * features);
    }
    data_ = copy_.data();
    count_ = static_cast<int64_t>(indices_.size());
  }

  const scalar_t* data() const { return data_; }
  int64_t count() const { return count_; }
  int64_t index(int64_t j) const { return indices_.empty() ? j : indices_[j]; }

 private:
  std::vector<int64_t> indices_;
  std::vector<scalar_t> copy_;
  const scalar_t* data_;
  int64_t count_;
};

// Writes `found` neighbours of a row, and fills up with absent ones.
template <typename scalar_t>
void write_row(Metric metric, const PresentRows<scalar_t>& y,
               const Neighbour<acc_t<scalar_t>>* neighbours, int64_t found, int64_t row,
               const Target<scalar_t>& out) {
  using value_t = acc_t<scalar_t>;
  scalar_t* distances = out.distances + row * out.k;
  int64_t* indices = out.indices + row * out.k;
  for (int64_t i = 0; i < out.k; ++i) {
    const bool is_found = i < found;
    distances[i] = static_cast<scalar_t>(is_found ? finish_ordered(metric, neighbours[i].distance)
                                                  : std::numeric_limits<value_t>::infinity());
    indices[i] = is_found ? y.index(neighbours[i].index) : kAbsent;
  }
}

// Calls search(prepared, count, neighbours) on blocks of rows of x, with a search of each thread.
template <typename scalar_t, typename MakeSearch>
void for_blocks(Metric metric, const scalar_t* x, const PresentRows<scalar_t>& y,
                const PairwiseShape& shape, int64_t found, int64_t block,
                const Target<scalar_t>& out, const MakeSearch& make_search) {
  using value_t = acc_t<scalar_t>;
  parallel_for(0, ceil_div(shape.queries, block), 1, [&](int64_t begin, int64_t end) {
    Buffer<value_t> rows(block * shape.features);
    std::vector<Neighbour<value_t>> neighbours(block * found);
    auto search = make_search();
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block, count = std::min(block, shape.queries - first);
      const value_t* prepared =
          prepare_rows(metric, x + first * shape.features, count, shape.features, rows.data());
      search(prepared, count, neighbours.data());
      for (int64_t r = 0; r < count; ++r) {
        write_row(metric, y, &neighbours[r * found], found, first + r, out);
      }
    }
  });
}

// Compares all distances of a block of rows of x.
template <typename scalar_t>
void compare_rows(Metric metric, const scalar_t* x, const PresentRows<scalar_t>& y,
                  const PairwiseShape& shape, int64_t found, const Target<scalar_t>& out) {
  using value_t = acc_t<scalar_t>;
  ClassRows<value_t> classes(shape);
  if (shape.classes > 0) classes.prepare(metric, y.data());
  const int64_t block = classes.block_of_queries();
  for_blocks(metric, x, y, shape, found, block, out, [&] {
    return [&, distances = Buffer<value_t>(block * shape.classes)](
               const value_t* rows, int64_t count, Neighbour<value_t>* neighbours) mutable {
      if (found == 0) return;
      distance_rows(ordered_by(metric), rows, count, classes, distances.data(), shape.classes);
      for (int64_t r = 0; r < count; ++r) {
        nearest_of(&distances[r * shape.classes], shape.classes, found, neighbours + r * found);
      }
    };
  });
}

template <typename scalar_t>
void nearest_task(Metric metric, const scalar_t* x, const PresentRows<scalar_t>& y,
                  PairwiseShape shape, const Target<scalar_t>& out) {
  using value_t = acc_t<scalar_t>;
  shape.classes = y.count();
  const int64_t found = std::min(out.k, y.count());
  if (SearchedRows<value_t>::suits(shape, found)) {
    SearchedRows<value_t> rows(metric, shape);
    if (rows.prepare(y.data())) {
      for_blocks(metric, x, y, shape, found, Search<value_t>::kBlock, out, [&] {
        return [search = Search<value_t>(rows, found)](const value_t* block, int64_t count,
                                                       Neighbour<value_t>* neighbours) mutable {
          search.run(block, count, neighbours);
        };
      });
      return;
    }
  }
  compare_rows(metric, x, y, shape, found, out);
}

std::tuple<at::Tensor, at::Tensor> nearest_cpu(const at::Tensor& x, const at::Tensor& y,
                                               const std::optional<at::Tensor>& present, int64_t k,
                                               std::string_view metric_name) {
  const Metric metric = checked_metric(metric_name);
  const PairwiseShape shape = checked_nearest_shape(x, y, present, k);
  const auto rows = x.contiguous(), columns = y.contiguous();
  const auto mask = present.has_value() ? present->contiguous() : at::Tensor();
  auto distances = at::empty({shape.tasks, shape.queries, k}, x.options());
  auto indices = at::empty(distances.sizes(), x.options().dtype(at::kLong));
  if (distances.numel() == 0) return {distances, indices};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "nearest", [&] {
    const auto* x_data = rows.const_data_ptr<scalar_t>();
    const auto* y_data = columns.const_data_ptr<scalar_t>();
    const bool* mask_data = mask.defined() ? mask.const_data_ptr<bool>() : nullptr;
    auto* distance_data = distances.mutable_data_ptr<scalar_t>();
    auto* index_data = indices.mutable_data_ptr<int64_t>();
    for_each_task_range(shape.tasks, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const PresentRows<scalar_t> present_rows(
            y_data + t * shape.classes * shape.features,
            mask_data == nullptr ? nullptr : mask_data + t * shape.classes, shape.classes,
            shape.features);
        const int64_t first = t * shape.queries;
        nearest_task<scalar_t>(metric, x_data + first * shape.features, present_rows, shape,
                               {distance_data + first * k, index_data + first * k, k});
      }
    });
  });
  return {distances, indices};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmeta, CPU, m) { m.impl("nearest", &nearest_cpu); }

}  // namespace fastmeta
