// Helpers of every CUDA binding: errors of launches, labels, workspaces.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <utility>

#include "common/check.h"
#include "common/cuda/checked_labels.h"
#include "common/cuda/label_range.h"
#include "common/labels.h"

namespace fastmeta {

inline void check_launch(int error, const char* op) {
  TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

inline void* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

inline at::Tensor scratch(int64_t bytes, const at::Tensor& like) {
  return at::empty({bytes}, like.options().dtype(at::kByte));
}

// Whether the current stream is being captured into a graph.
inline bool is_being_captured() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

// Whether an entry of labels [T, E], contiguous, is outside lowest <= label < classes. Waits for the
// answer.
inline bool has_cuda_label_out_of_range(const at::Tensor& labels, int64_t classes, const char* name,
                                        int64_t lowest = 0) {
  const auto bad = at::empty({kLabelRangeParts}, labels.options().dtype(at::kInt));
  check_launch(launch_label_range(labels.const_data_ptr<int64_t>(), labels.numel(), lowest, classes,
                                  bad.mutable_data_ptr<int>(), current_stream()),
               name);
  const auto answer = bad.cpu();
  const int* part = answer.const_data_ptr<int>();
  return std::any_of(part, part + answer.numel(), [](int found) { return found != 0; });
}

// Calls check(), which raises for labels [T, E] out of range, unless these labels have passed it
// before. A stream being captured cannot wait for an answer: there the kernels treat such a label
// as their header says.
template <typename Check>
void check_cuda_labels_once(const at::Tensor& labels, const LabelRange& range, const Check& check) {
  if (labels.numel() == 0 || is_being_captured()) return;
  if (!LabelsInRange::can_be_known(labels)) return check();
  LabelsInRange now(labels, range);  // before the check: a write during it is a later version
  auto& checked = CheckedLabels::instance();
  if (checked.has(now)) return;
  check();
  checked.add(std::move(now));
}

// Same as check_label_range, for labels [T, E] on a GPU, contiguous. Labels that a graph captures
// count as present: the kernels find the absent ones, whose values must then be finite.
inline bool check_cuda_label_range(const at::Tensor& labels, int64_t classes, const char* name) {
  if (labels.numel() == 0 || is_being_captured()) return false;
  const auto has_absent = [&] {
    return has_cuda_label_out_of_range(labels, classes, name) &&
           check_label_range(labels.cpu(), classes, name);
  };
  if (!LabelsInRange::can_be_known(labels)) return has_absent();
  auto& checked = CheckedLabels::instance();
  LabelsInRange all_present(labels, {classes});  // before the check, as above
  if (checked.has(all_present)) return false;
  LabelsInRange some_absent(labels, {classes, kAbsent});
  if (checked.has(some_absent)) return true;
  const bool found = has_absent();
  checked.add(std::move(found ? some_absent : all_present));
  return found;
}

}  // namespace fastmeta
