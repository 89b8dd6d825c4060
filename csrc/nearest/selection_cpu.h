// Selection of the k nearest of candidates whose distances are known between bounds.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "nearest/nearest.h"

namespace fastmeta {

template <typename value_t>
bool is_nearer(const Neighbour<value_t>& a, const Neighbour<value_t>& b) {
  return a.is_before(b);
}

// Writes the k first of n distances, in order; they may be NaN.
template <typename value_t>
void nearest_of(const value_t* distances, int64_t n, int64_t k, Neighbour<value_t>* out) {
  if (k == 1) {
    *out = {distances[0], 0};
    for (int64_t j = 1; j < n; ++j) {
      const Neighbour<value_t> other{distances[j], j};
      if (other.is_before(*out)) *out = other;
    }
    return;
  }
  std::vector<Neighbour<value_t>> all(n);
  for (int64_t j = 0; j < n; ++j) all[j] = {distances[j], j};
  std::partial_sort(all.begin(), all.begin() + k, all.end(), is_nearer<value_t>);
  std::copy_n(all.begin(), k, out);
}

// The rows of y that may be among the k nearest to one row of x.
//
// Each is given with a lower and an upper bound of its distance. The k-th smallest upper bound is
// the limit: a row whose lower bound is above it is none of the k nearest. Distances are summed
// exactly, by measure(entry), only at the end, or if so many rows are so near each other that the
// list is full.
template <typename value_t>
class Candidates {
 public:
  explicit Candidates(int64_t k)
      : k_(k), capacity_(2 * k + 16), upper_(k, std::numeric_limits<value_t>::infinity()) {
    entries_.reserve(capacity_);
  }

  void clear() {
    entries_.clear();
    std::fill(upper_.begin(), upper_.end(), std::numeric_limits<value_t>::infinity());
  }

  value_t limit() const { return upper_.back(); }

  // Adds a row. `measure` is called if the list is full.
  template <typename Measure>
  void add(value_t lower, value_t upper, int64_t index, const Measure& measure) {
    if (static_cast<int64_t>(entries_.size()) == capacity_) make_room(measure);
    entries_.push_back({lower, index});
    if (!(upper < limit())) return;
    int64_t place = k_ - 1;
    for (; place > 0 && upper < upper_[place - 1]; --place) upper_[place] = upper_[place - 1];
    upper_[place] = upper;
  }

  // Returns the k nearest in order, or fewer if there are no more candidates.
  template <typename Measure>
  const std::vector<Neighbour<value_t>>& finish(const Measure& measure) {
    drop_far();
    measure_all(measure);
    return entries_;
  }

 private:
  template <typename Measure>
  void make_room(const Measure& measure) {
    drop_far();
    if (static_cast<int64_t>(entries_.size()) <= k_ + 8) return;
    measure_all(measure);
    for (int64_t i = 0; i < k_; ++i) upper_[i] = entries_[i].distance;
  }

  void drop_far() {
    std::erase_if(entries_, [&](const auto& entry) { return entry.distance > limit(); });
  }

  template <typename Measure>
  void measure_all(const Measure& measure) {
    for (auto& entry : entries_) entry.distance = measure(entry);
    std::sort(entries_.begin(), entries_.end(), is_nearer<value_t>);
    if (static_cast<int64_t>(entries_.size()) > k_) entries_.resize(k_);
  }

  int64_t k_, capacity_;
  std::vector<value_t> upper_;               // the k smallest, in order
  std::vector<Neighbour<value_t>> entries_;  // lower bounds
};

}  // namespace fastmeta
