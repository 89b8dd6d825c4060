// Barriers of a block: a step waits for earlier steps if it touches their numbers.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "task_program/cuda/block_arrays.cuh"

namespace fastmeta {

enum class Start : int8_t {
  kWaits,   // for the steps before it
  kAtOnce,  // touches no numbers of steps since the last wait
  kOwn,     // at once; a thread takes the elements that it made in the product before
};

// Interval of numbers [first, first + count).
struct Range {
  int first = 0, count = 0;

  Range() = default;
  template <typename value_t>
  Range(const Array<InShared<value_t>>& a, int64_t n)
      : first(a.offset), count(a ? static_cast<int>(n) : 0) {}

  bool operator==(const Range&) const = default;
  bool overlaps(const Range& other) const {
    return first < other.first + other.count && other.first < first + count;
  }
};

class Ranges {
 public:
  Ranges() = default;
  Ranges(std::initializer_list<Range> ranges) {
    for (const auto& range : ranges) add(range);
  }

  bool has_room() const { return count_ + kMostOfStep <= kMost; }
  void clear() { count_ = 0; }
  void add(const Range& range) { ranges_[count_++] = range; }
  void add(const Ranges& others) {
    for (int i = 0; i < others.count_; ++i) add(others.ranges_[i]);
  }
  // Whether any of these meets any of the others; `but` meets none.
  bool overlap(const Ranges& others, const Range& but) const {
    return std::any_of(ranges_, ranges_ + count_, [&](const Range& range) {
      return !(range == but) &&
             std::any_of(others.ranges_, others.ranges_ + others.count_,
                         [&](const Range& other) { return range.overlaps(other); });
    });
  }

 private:
  static constexpr int kMost = 32, kMostOfStep = 8;
  Range ranges_[kMost];
  int count_ = 0;
};

struct Touched {
  Ranges reads, writes;
};

// Numbers that steps touch and that are often contiguous.

template <typename value_t>
Touched touched_by(const Product<InShared<value_t>>& p) {
  const int64_t a = p.m * p.k, b = p.k * p.n;
  return {{Range(p.a[0], a), Range(p.a[1], a), Range(p.b[0], b), Range(p.b[1], b),
           Range(p.bias, p.n), Range(p.into.step_size, 1)},
          {Range(p.c, p.m * p.n)}};
}

template <typename S>
Touched touched_by(const Descend<S>& f, int64_t n) {
  return {{Range(f.lr, f.per_parameter ? n : 1), Range(f.base, n), Range(f.x, n)},
          {Range(f.target, n)}};
}

template <typename S, typename Finish>
Touched touched_by(const ColumnSums<S, Finish>& f, int64_t n) {
  Touched touched{{Range(f.source, f.rows * f.columns), Range(f.into.step_size, 1)},
                  {Range(f.target, n)}};
  if constexpr (!std::is_same_v<Finish, NoFinish>) {
    const Touched after = touched_by(f.finish, n);
    touched.reads.add(after.reads);
    touched.writes.add(after.writes);
  }
  return touched;
}

template <typename S>
Touched touched_by(const ActivationForward<Activation, S>& f, int64_t n) {
  return {{Range(f.z, n)}, {Range(f.y, n)}};
}

template <typename S>
Touched touched_by(const ActivationSlope<Activation, S>& f, int64_t n) {
  return {{Range(f.z, n), Range(f.source, n)}, {Range(f.target, n)}};
}

template <typename S>
Touched touched_by(const ActivationTangentBackward<Activation, S>& f, int64_t n) {
  return {{Range(f.z, n), Range(f.z_dot, n), Range(f.dy, n), Range(f.dy_dot, n)},
          {Range(f.dz_dot, n)}};
}

// Numbers that steps touched since the last wait.
class BlockWaits {
 public:
  Start start(const Touched& step) { return start_unless(step, Range(), Start::kAtOnce); }

  // Starts a step on the elements `c` that the product before has made.
  Start start_own(const Touched& step, const Range& c) {
    return start_unless(step, c, Start::kOwn);
  }

  // Starts a step that may touch anything.
  Start start_after_all() {
    knows_all_ = false;
    return Start::kWaits;
  }

 private:
  Start start_unless(const Touched& step, const Range& but, Start start) {
    const bool meets = reads_.overlap(step.writes, but) || writes_.overlap(step.writes, but) ||
                       writes_.overlap(step.reads, but);
    if (!knows_all_ || meets || !reads_.has_room() || !writes_.has_room()) {
      reads_.clear();
      writes_.clear();
      start = Start::kWaits;
    }
    reads_.add(step.reads);
    writes_.add(step.writes);
    knows_all_ = true;
    return start;
  }

  bool knows_all_ = false;
  Ranges reads_, writes_;
};

}  // namespace fastmeta
