#include "shared_memory.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace emulator {
namespace {

constexpr int16_t kManyWarps = -1;
constexpr int kPoison = 0xff;  // a NaN in every floating-point type

std::string described(const SharedArray& array, uintptr_t address, size_t bytes, Access kind) {
  const auto offset = static_cast<ptrdiff_t>(address - array.address);
  return std::string(kind == Access::kRead ? "reads " : "writes ") + std::to_string(bytes) +
         " bytes at byte " + std::to_string(offset) + " of the " + std::to_string(array.bytes) +
         " bytes of shared memory " + array.name;
}

}  // namespace

void WarpClock::synchronize(unsigned mask) {
  ++now_;
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    auto& met = met_[std::countr_zero(rest)];
    for (int lane = 0; lane < kWarp; ++lane) {
      if (mask >> lane & 1) met[lane] = now_;
    }
  }
}

SharedArray::SharedArray(uintptr_t address, size_t bytes, size_t slot, std::string name,
                         size_t most_bytes)
    : address(address),
      bytes(bytes),
      slot(slot),
      name(std::move(name)),
      words(most_bytes / kWord + 1),
      bytes_of_words(kWord * words.size()) {}

SharedMemory::SharedMemory()
    : dynamic_(reinterpret_cast<uintptr_t>(std::aligned_alloc(kSlot, kArena)) + kSlot, 0,
               kArena - kSlot, "(dynamic)", kMaxDynamic) {}

void SharedMemory::add_static(uintptr_t address, size_t bytes, uintptr_t end, const char* name) {
  const size_t slot = std::min(kSlot, end - address);
  last_ = nullptr;
  statics_.emplace_back(address, bytes, slot, name, bytes);
  std::sort(statics_.begin(), statics_.end(),
            [](const auto& a, const auto& b) { return a.address < b.address; });
}

void SharedMemory::begin_block(size_t dynamic_bytes) {
  ++block_;
  ++interval_;
  for (auto& clock : clocks_) {
    if (clock.now() != 0) clock.reset();
  }
  dynamic_.bytes = dynamic_bytes;
  std::memset(dynamic(), kPoison, dynamic_bytes);
  for (auto& array : statics_) {
    if (array.is_clean) continue;
    std::memset(reinterpret_cast<void*>(array.address), kPoison, array.bytes);
    array.is_clean = true;
  }
}

SharedArray* SharedMemory::find_static(uintptr_t address) {
  if (statics_.empty() || address < statics_.front().address) return nullptr;
  const auto is_before = [](uintptr_t a, const auto& array) { return a < array.address; };
  const auto next = std::upper_bound(statics_.begin(), statics_.end(), address, is_before);
  auto& array = *std::prev(next);
  if (address - array.address >= array.slot) return nullptr;
  last_ = &array;
  return last_;
}

bool SharedMemory::is_ordered(int thread, uint32_t time, int other) const {
  return thread == other || (thread / kWarp == other / kWarp &&
                             clocks_[thread / kWarp].orders(thread % kWarp, time, other % kWarp));
}

std::string SharedMemory::race(const AccessLog& log, int thread, Access kind) const {
  const bool both_atomic = kind == Access::kAtomic && log.written_atomically;
  if (log.writer >= 0 && log.write_interval == interval_ && !both_atomic &&
      !is_ordered(thread, log.write_time, log.writer)) {
    return "which thread " + std::to_string(log.writer) + " writes";
  }
  if (kind == Access::kRead || log.read_interval != interval_) return "";
  if (log.reading_warp != thread / kWarp) return "which a thread of another warp reads";
  for (unsigned lanes = log.reading_lanes; lanes != 0; lanes &= lanes - 1) {
    const int reader = log.reading_warp * kWarp + std::countr_zero(lanes);
    if (!is_ordered(thread, log.read_time, reader)) {
      return "which thread " + std::to_string(reader) + " reads";
    }
  }
  return "";
}

void SharedMemory::record(AccessLog& log, int thread, Access kind) {
  const int warp = thread / kWarp;
  const uint32_t now = clocks_[warp].now();
  if (kind != Access::kRead) {
    log.writer = static_cast<int16_t>(thread);
    log.write_interval = interval_;
    log.write_time = now;
    log.written_atomically = kind == Access::kAtomic;
  } else if (log.read_interval != interval_) {
    log.read_interval = interval_;
    log.read_time = now;
    log.reading_warp = static_cast<int16_t>(warp);
    log.reading_lanes = 1U << thread % kWarp;
  } else if (log.reading_warp == warp) {
    log.read_time = now;
    log.reading_lanes |= 1U << thread % kWarp;
  } else {
    log.reading_warp = kManyWarps;
  }
}

bool SharedMemory::touch(AccessLog& log, int thread, Access kind) {
  if (kind != Access::kWrite && log.writer < 0) {
    error_ = "which no thread has written";
    return false;
  }
  if (!is_alone(log, thread, kind)) {
    const auto other = race(log, thread, kind);
    if (!other.empty()) {
      error_ = other + " with no barrier between";
      return false;
    }
  }
  record(log, thread, kind);
  return true;
}

AccessLog& SharedMemory::word_of(SharedArray& array, size_t offset) const {
  auto& word = array.words[offset / kWord];
  if (word.block != block_) word = {.block = block_};
  return word;
}

// From here on the bytes of a word have logs of their own.
void SharedMemory::split(SharedArray& array, size_t offset) {
  auto& word = array.words[offset / kWord];
  const auto first = array.bytes_of_words.begin() + static_cast<ptrdiff_t>(offset / kWord * kWord);
  std::fill_n(first, kWord, word);
  word.is_split = true;
}

bool SharedMemory::access(SharedArray& array, int thread, uintptr_t address, size_t bytes,
                          Access kind) {
  const size_t offset = address - array.address;
  const auto refuse = [&] {
    error_ = described(array, address, bytes, kind) + ", " + error_;
    return false;
  };
  if (offset >= array.bytes || bytes > array.bytes - offset) {
    error_ = "which is out of bounds";
    return refuse();
  }
  array.is_clean = false;
  for (size_t i = offset, end = offset + bytes; i < end;) {
    auto& word = word_of(array, i);
    if (!word.is_split && i % kWord == 0 && end - i >= kWord) {
      if (!touch(word, thread, kind)) return refuse();
      i += kWord;
    } else {
      if (!word.is_split) split(array, i);
      if (!touch(array.bytes_of_words[i], thread, kind)) return refuse();
      ++i;
    }
  }
  return true;
}

}  // namespace emulator
