// Labels that were found in range: looking at them again would stop the host until the device is
// done.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <list>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace fastmeta {

// A label is in range if lowest <= label < classes, or if it is `ignored`.
struct LabelRange {
  int64_t classes;
  std::optional<int64_t> ignored = {};
  int64_t lowest = 0;
  bool operator==(const LabelRange&) const = default;
};

// Labels as they are now, and a range. A tensor is known by itself and its storage, not by an
// address that another one may have later: weak references keep both addresses from being reused.
// Its version counts the writes that PyTorch sees. One by the replay of a CUDA graph, or through
// `.data`, is not among them.
class LabelsInRange {
 public:
  LabelsInRange(const at::Tensor& labels, const LabelRange& range)
      : tensor_(labels.getIntrusivePtr()),
        storage_(labels.storage().getWeakStorageImpl()),
        data_(labels.const_data_ptr()),
        version_(labels._version()),
        sizes_(labels.sizes().vec()),
        strides_(labels.strides().vec()),
        range_(range) {}

  // Tensors made in inference mode do not count the writes to them.
  static bool can_be_known(const at::Tensor& labels) {
    return labels.has_storage() && labels.unsafeGetTensorImpl()->version_counter().enabled();
  }

  bool operator==(const LabelsInRange& other) const {
    return is_replaced_by(other) &&
           storage_._unsafe_get_target() == other.storage_._unsafe_get_target() &&
           data_ == other.data_ && version_ == other.version_ && sizes_ == other.sizes_ &&
           strides_ == other.strides_;
  }
  bool is_replaced_by(const LabelsInRange& other) const {
    return tensor_._unsafe_get_target() == other.tensor_._unsafe_get_target() &&
           range_ == other.range_;
  }
  bool is_gone() const { return tensor_.expired(); }

 private:
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> tensor_;
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;
  const void* data_;
  int64_t version_;
  std::vector<int64_t> sizes_, strides_;
  LabelRange range_;
};

// Labels of queries and of supports as they are now, of which each query has a support of its class.
struct SupportedLabels {
  LabelsInRange queries, supports;
  bool exclude_self;

  bool operator==(const SupportedLabels&) const = default;
  bool is_replaced_by(const SupportedLabels& other) const {
    return queries.is_replaced_by(other.queries) && supports.is_replaced_by(other.supports) &&
           exclude_self == other.exclude_self;
  }
  bool is_gone() const { return queries.is_gone() || supports.is_gone(); }
};

// The labels checked last, for all threads.
template <typename Labels>
class LastChecked {
 public:
  static LastChecked& instance() {
    // Never destroyed: at the end of the process the references may outlive what they need.
    static auto& checked = *new LastChecked;
    return checked;
  }

  bool has(const Labels& labels) {
    const std::lock_guard lock(mutex_);
    const auto found = std::find(known_.begin(), known_.end(), labels);
    if (found == known_.end()) return false;
    known_.splice(known_.begin(), known_, found);
    return true;
  }

  void add(Labels labels) {
    const std::lock_guard lock(mutex_);
    std::erase_if(known_, [&](const Labels& other) {
      return other.is_gone() || other.is_replaced_by(labels);
    });
    known_.push_front(std::move(labels));
    if (known_.size() > kMost) known_.pop_back();
  }

 private:
  static constexpr size_t kMost = 32;
  std::mutex mutex_;
  std::list<Labels> known_;  // the one used last comes first
};

using CheckedLabels = LastChecked<LabelsInRange>;

}  // namespace fastmeta
