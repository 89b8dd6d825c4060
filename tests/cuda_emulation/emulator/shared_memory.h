// The shared memory of the running block, and what its threads did to every byte of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

inline constexpr int kWarp = 32;
inline constexpr int kMaxThreads = 1024;

inline constexpr size_t kWord = 4;  // bytes, which most accesses take together

enum class Access { kRead, kWrite, kAtomic };

// Orders the accesses of lanes of a warp: what __syncwarp does.
class WarpClock {
 public:
  void reset() { *this = {}; }
  uint32_t now() const { return now_; }
  void synchronize(unsigned mask);
  // Whether a __syncwarp of both lanes came after `time`.
  bool orders(int lane, uint32_t time, int other_lane) const {
    return met_[lane][other_lane] > time;
  }

 private:
  uint32_t now_ = 0;
  uint32_t met_[kWarp][kWarp] = {};
};

// What threads did to a byte, or alike to the four bytes of a word, since the last barrier, and whether
// it was ever written. Of the reads of a warp the last one's time counts for all: a __syncwarp orders
// them once it came after each.
struct AccessLog {
  uint32_t block = 0;  // the rest is about this block; nothing happened in a later one
  uint32_t write_interval = 0, write_time = 0;
  uint32_t read_interval = 0, read_time = 0;
  uint32_t reading_lanes = 0;
  int16_t writer = -1;
  int16_t reading_warp = 0;  // kManyWarps: more than one
  bool written_atomically = false;
  bool is_split = false;  // of a word: its bytes have logs of their own
};

struct SharedArray {
  // Of at most `most_bytes`.
  SharedArray(uintptr_t address, size_t bytes, size_t slot, std::string name, size_t most_bytes);

  uintptr_t address;
  size_t bytes;
  size_t slot;  // up to the next one, or to where other memory begins
  std::string name;
  std::vector<AccessLog> words,
      bytes_of_words;     // the logs of a word, and of its bytes if it is split
  bool is_clean = false;  // full of poison: no thread accessed it since it was filled
};

class SharedMemory {
 public:
  SharedMemory();

  // A __shared__ array of a kernel library, whose own memory ends at `end`. The library aligns each
  // array to kSlot bytes, so that what lies behind it in its slot is nobody's.
  void add_static(uintptr_t address, size_t bytes, uintptr_t end, const char* name);

  void begin_block(size_t dynamic_bytes);
  void barrier() { ++interval_; }
  void synchronize_warp(int warp, unsigned mask) { clocks_[warp].synchronize(mask); }

  void* dynamic() const { return reinterpret_cast<void*>(dynamic_.address); }
  // The array in whose slot an address lies, or null.
  SharedArray* find(uintptr_t address) {
    if (address - (dynamic_.address - kSlot) < kArena) return &dynamic_;
    if (last_ != nullptr && address - last_->address < last_->slot) return last_;
    return find_static(address);
  }
  // Logs an access to `array`. Whether it is allowed; if not, error() says why.
  bool access(SharedArray& array, int thread, uintptr_t address, size_t bytes, Access kind);
  const std::string& error() const { return error_; }

  static constexpr size_t kSlot = 64 * 1024;
  static constexpr size_t kMaxDynamic = 227 * 1024;

 private:
  static constexpr size_t kArena = 6 * kSlot;  // a slot before and a slot behind the dynamic memory

  SharedArray* find_static(uintptr_t address);
  AccessLog& word_of(SharedArray& array, size_t offset) const;
  static void split(SharedArray& array, size_t offset);
  // Logs an access to what `log` is about. Whether it is allowed; if not, error_ says why.
  bool touch(AccessLog& log, int thread, Access kind);
  // Whether no other thread has written, or read what is now written, since the barrier.
  bool is_alone(const AccessLog& log, int thread, Access kind) const {
    if (log.write_interval == interval_ && log.writer != thread) return false;
    return kind == Access::kRead || log.read_interval != interval_ ||
           (log.reading_warp == thread / kWarp && log.reading_lanes == 1U << thread % kWarp);
  }
  // Which access of another thread this one is not ordered with; empty if there is none.
  std::string race(const AccessLog& log, int thread, Access kind) const;
  void record(AccessLog& log, int thread, Access kind);
  bool is_ordered(int thread, uint32_t time, int other) const;

  SharedArray dynamic_;
  std::vector<SharedArray> statics_;  // by address
  WarpClock clocks_[kMaxThreads / kWarp];
  SharedArray* last_ = nullptr;  // that find() found
  uint32_t block_ = 0, interval_ = 1;
  std::string error_;
};

}  // namespace emulator
