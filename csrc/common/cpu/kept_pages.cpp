#include "common/cpu/kept_pages.h"

#include <c10/core/CPUAllocator.h>
#include <pthread.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_set>
#include <utility>
#include <vector>

#include "common/ceil_div.h"
#include "common/cpu/huge_pages.h"
#include "common/cpu/workspace.h"

namespace fastmeta {
namespace {

constexpr size_t kSmallest = 256 << 10;  // the C library keeps smaller blocks by itself
constexpr size_t kStep = 64 << 10;       // sizes are multiples of it, so that more of them fit
constexpr size_t kPage = 4096;

// At the start of a block's first page; the data follow, aligned as PyTorch's tensors are.
struct alignas(64) Header {
  size_t bytes;  // with the header
};

// The blocks in use, and those that no tensor uses, the oldest first.
class Blocks {
 public:
  explicit Blocks(size_t most) : most_(most) {}

  // A block of at least so many bytes; null if there is no memory.
  Header* take(size_t bytes) {
    const std::lock_guard<std::mutex> guard(guard_);
    Header* block = best_kept(bytes);
    if (block == nullptr) block = make(bytes);
    if (block == nullptr && free_all() > 0) block = make(bytes);
    if (block != nullptr) used_.insert(block);
    return block;
  }
  // Whether a tensor uses this block; any pointer may be asked about.
  bool is_used(Header* block) {
    const std::lock_guard<std::mutex> guard(guard_);
    return used_.contains(block);
  }
  // Takes back a block; the oldest ones make room for it.
  void give_back(Header* block) {
    const std::lock_guard<std::mutex> guard(guard_);
    used_.erase(block);
    if (block->bytes > most_) return std::free(block);
    auto first = kept_.begin();
    for (; total_ + block->bytes > most_; ++first) {
      total_ -= (*first)->bytes;
      std::free(*first);
    }
    kept_.erase(kept_.begin(), first);
    kept_.push_back(block);
    total_ += block->bytes;
  }
  size_t release() {
    const std::lock_guard<std::mutex> guard(guard_);
    return free_all();
  }
  // A process that forks must not leave the lock to its child.
  std::mutex& guard() { return guard_; }

 private:
  // The smallest block that fits, and among those the youngest.
  Header* best_kept(size_t bytes) {
    auto best = kept_.end();
    for (auto block = kept_.begin(); block != kept_.end(); ++block) {
      const size_t size = (*block)->bytes;
      if (size < bytes || size - bytes > bytes / 4) continue;  // a quarter may be left over
      if (best == kept_.end() || size <= (*best)->bytes) best = block;
    }
    if (best == kept_.end()) return nullptr;
    Header* found = *best;
    kept_.erase(best);
    total_ -= found->bytes;
    return found;
  }
  static Header* make(size_t bytes) {
    void* memory = std::aligned_alloc(bytes < 2 * kHugePage ? kPage : kHugePage, bytes);
    if (memory == nullptr) return nullptr;
    use_huge_pages(memory, static_cast<int64_t>(bytes));
    return new (memory) Header{bytes};
  }
  size_t free_all() {
    for (Header* block : kept_) std::free(block);
    kept_.clear();
    return std::exchange(total_, 0);
  }

  const size_t most_;
  std::mutex guard_;
  std::unordered_set<Header*> used_;
  std::vector<Header*> kept_;
  size_t total_ = 0;  // bytes in kept_
};

// Never destroyed: tensors may outlive the statics.
Blocks& blocks() {
  static auto* all = new Blocks(static_cast<size_t>(most_kept()));
  return *all;
}

thread_local int open_scopes = 0;

// Serves large tensors in scopes; another allocator serves the rest. All get the same deleter, as
// PyTorch asks of an allocator whose memory oneDNN may use.
class KeepingAllocator final : public c10::Allocator {
 public:
  explicit KeepingAllocator(c10::Allocator* other) : other_(other) {
    deleter_of_other = other->raw_deleter();
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (open_scopes > 0 && bytes >= kSmallest) {
      const auto needed = ceil_div(static_cast<int64_t>(bytes + sizeof(Header)), kStep) * kStep;
      if (Header* block = blocks().take(needed)) {
        void* data = block + 1;
        c10::profiledCPUMemoryReporter().New(data, bytes);
        return {data, data, &give_back, c10::Device(c10::DeviceType::CPU)};
      }
    }
    auto memory = other_->allocate(bytes);
    // All memory of the other allocator has this deleter: it has a raw_deleter().
    [[maybe_unused]] const bool exchanged =
        memory.compare_exchange_deleter(deleter_of_other, &give_back);
    TORCH_INTERNAL_ASSERT_DEBUG_ONLY(exchanged);
    return memory;
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    other_->copy_data(to, from, bytes);
  }

 private:
  static void give_back(void* data) {
    // Where the data of a block begin; few other tensors begin there.
    if (reinterpret_cast<uintptr_t>(data) % kPage == sizeof(Header)) {
      Header* block = static_cast<Header*>(data) - 1;
      if (blocks().is_used(block)) {
        c10::profiledCPUMemoryReporter().Delete(data);  // before it may serve another tensor
        return blocks().give_back(block);
      }
    }
    deleter_of_other(data);
  }

  static inline c10::DeleterFnPtr deleter_of_other = nullptr;
  c10::Allocator* other_;
};

void install() {
  blocks();  // raises for a limit that is no number; no block exists yet
  auto* before = c10::GetCPUAllocator();
  if (before->raw_deleter() == nullptr) return;  // its memory cannot be told from ours
  pthread_atfork([] { blocks().guard().lock(); }, [] { blocks().guard().unlock(); },
                 [] { blocks().guard().unlock(); });
  // Never destroyed, as PyTorch keeps the pointer.
  c10::SetAllocator(c10::DeviceType::CPU, new KeepingAllocator(before));
}

}  // namespace

void begin_keeping_pages() {
  static std::once_flag once;
  std::call_once(once, install);
  ++open_scopes;
}

void end_keeping_pages() { --open_scopes; }

int64_t release_pages() { return static_cast<int64_t>(blocks().release()); }

}  // namespace fastmeta
