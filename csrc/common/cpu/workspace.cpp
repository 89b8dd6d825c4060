#include "common/cpu/workspace.h"

#include <ATen/ops/empty.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "common/cpu/huge_pages.h"

namespace fastmeta {
namespace {

// The memory that one thread keeps. Another thread may release it.
class Kept {
 public:
  at::Tensor get(int64_t bytes) {
    const std::lock_guard<std::mutex> guard(guard_);
    return memory_.defined() && memory_.numel() >= bytes ? memory_ : at::Tensor();
  }
  int64_t exchange(at::Tensor memory) {
    const std::lock_guard<std::mutex> guard(guard_);
    std::swap(memory_, memory);
    return memory.defined() ? memory.numel() : 0;
  }

 private:
  std::mutex guard_;
  at::Tensor memory_;
};

struct Threads {
  std::mutex guard;
  std::vector<std::weak_ptr<Kept>> kept;
};

// Never destroyed: threads may outlive the statics.
Threads& threads() {
  static auto* all = new Threads;
  return *all;
}

std::shared_ptr<Kept> of_new_thread() {
  auto own = std::make_shared<Kept>();
  const std::lock_guard<std::mutex> guard(threads().guard);
  std::erase_if(threads().kept, [](const auto& kept) { return kept.expired(); });
  threads().kept.push_back(own);
  return own;
}

}  // namespace

int64_t most_kept() {
  const char* text = std::getenv("FASTMETA_WORKSPACE_MB");
  if (text == nullptr || *text == '\0') return int64_t{1} << 30;
  const std::string value(text);
  const bool is_number = value.size() < 10 && value.find_first_not_of("0123456789") == value.npos;
  TORCH_CHECK_VALUE(is_number, "FASTMETA_WORKSPACE_MB: expected a number of MiB, got ", value);
  return std::stoll(value) << 20;
}

at::Tensor workspace(int64_t bytes) {
  static const int64_t most = most_kept();
  thread_local const std::shared_ptr<Kept> own = of_new_thread();
  if (auto kept = own->get(bytes); kept.defined()) return kept;
  own->exchange({});  // first: both need not exist at once
  auto memory = at::empty({bytes}, at::kByte);
  use_huge_pages(memory.mutable_data_ptr(), bytes);
  if (bytes <= most) own->exchange(memory);
  return memory;
}

int64_t release_workspaces() {
  const std::lock_guard<std::mutex> guard(threads().guard);
  int64_t bytes = 0;
  for (const auto& kept : threads().kept) {
    if (const auto alive = kept.lock()) bytes += alive->exchange({});
  }
  return bytes;
}

}  // namespace fastmeta
