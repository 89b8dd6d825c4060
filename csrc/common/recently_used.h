// A map that keeps the entries used last, for threads to share.
#pragma once

#include <algorithm>
#include <cstddef>
#include <list>
#include <mutex>
#include <utility>

namespace fastmeta {

// Few entries: a search looks at all of them. Values are copied, so they are small or pointers.
template <typename Key, typename Value>
class RecentlyUsed {
 public:
  explicit RecentlyUsed(size_t most) : most_(most) {}

  // The value that is kept for the key; if there is none, make() gives it.
  template <typename Make>
  Value get(const Key& key, const Make& make) {
    {
      const std::lock_guard lock(mutex_);
      if (const Value* kept = find(key)) return *kept;
    }
    Value made = make();  // without the lock: other threads need not wait for it
    const std::lock_guard lock(mutex_);
    if (const Value* kept = find(key)) return *kept;  // another thread was faster
    entries_.emplace_front(key, made);
    if (entries_.size() > most_) entries_.pop_back();
    return made;
  }

 private:
  // Moves the entry to the front.
  const Value* find(const Key& key) {
    const auto found = std::find_if(entries_.begin(), entries_.end(),
                                    [&](const auto& entry) { return entry.first == key; });
    if (found == entries_.end()) return nullptr;
    entries_.splice(entries_.begin(), entries_, found);
    return &found->second;
  }

  size_t most_;
  std::mutex mutex_;
  std::list<std::pair<Key, Value>> entries_;  // the one used last comes first
};

}  // namespace fastmeta
