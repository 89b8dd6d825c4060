#include "common/cpu/parallel.h"

#include <ATen/Parallel.h>
#include <omp.h>
#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <thread>

#include "common/cpu/blas_threads.h"

namespace fastmeta {
namespace {

using Piece = void (*)(const void* loop, int64_t i);
using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

constexpr int kSpins = 32;  // looks at a counter between two readings of the clock
// A helper that looks for work after its last piece begins the next loop at once. One that sleeps
// takes tens of microseconds to wake. Longer than between two steps of a training loop:
constexpr microseconds kAwake{200};
constexpr microseconds kPatience{20};  // of a caller before it sleeps

// A team is late if the caller waits for it longer than this, and longer than for kLateFactor times
// its own piece; pieces are of one size. It then pauses, each time twice as long.
constexpr microseconds kLate{300};
constexpr int kLateFactor = 3;
constexpr microseconds kFirstPause{20'000}, kLongestPause{1'000'000};

thread_local bool in_loop = false;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Spins until done(); returns whether it came true in time.
template <typename Done>
bool spin(microseconds time, const Done& done) {
  const auto end = Clock::now() + time;
  do {
    for (int i = 0; i < kSpins; ++i) {
      if (done()) return true;
      pause();
    }
  } while (Clock::now() < end);
  return done();
}

// Makes this thread's loops, PyTorch's, OpenMP's and the BLAS's use no other thread, for a scope.
class OneThread {
 public:
  OneThread() : threads_(at::get_num_threads()) {
    omp_set_num_threads(1);
    in_loop = true;
  }
  ~OneThread() {
    in_loop = false;
    omp_set_num_threads(threads_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int threads_;
  OneBlasThread blas_;
};

// The threads that help callers, one loop at a time.
class Helpers {
 public:
  void run(int64_t count, Piece piece, const void* loop) {
    const std::unique_lock<std::mutex> own(turn_, std::try_to_lock);
    if (!own) return run_here(count, piece, loop);  // the helpers are at another thread's loop
    start(count - 1);
    piece_ = piece;
    loop_ = loop;
    count_ = count;
    unfinished_.store(static_cast<int32_t>(count), std::memory_order_relaxed);
    offer(count);
    {
      const OneThread one;
      while (take()) {
      }
    }
    wait();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  // The offer: a number of the loop, and below it how many of its pieces are not taken. A piece is
  // taken by counting down, so nobody takes one of a loop that has ended.
  static constexpr int kBits = 16;
  static constexpr uint64_t kLeft = (uint64_t{1} << kBits) - 1;

  static void run_here(int64_t count, Piece piece, const void* loop) {
    const OneThread one;
    for (int64_t i = 0; i < count; ++i) piece(loop, i);
  }

  void start(int64_t threads) {
    // Python handles signals on threads of its own.
    sigset_t all, before;
    for (; threads_ < threads; ++threads_) {
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
      std::thread([this] { help(); }).detach();
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
  }

  void offer(int64_t count) {
    const uint64_t next = (offer_.load(std::memory_order_relaxed) >> kBits) + 1;
    offer_.store(next << kBits | static_cast<uint64_t>(count));
    for (int64_t i = std::min<int64_t>(asleep_.load(), count - 1); i > 0; --i) {
      calls_.fetch_add(1);
      calls_.notify_one();
    }
  }

  // Takes a piece and runs it; returns whether there was one.
  bool take() {
    uint64_t seen = offer_.load(std::memory_order_acquire);
    do {
      if ((seen & kLeft) == 0) return false;
    } while (!offer_.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel));
    // The loop lasts until this piece is done, so what describes it stays.
    try {
      piece_(loop_, count_ - static_cast<int64_t>(seen & kLeft));
    } catch (...) {
      const std::lock_guard<std::mutex> guard(error_guard_);
      if (!error_) error_ = std::current_exception();
    }
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
    return true;
  }

  void wait() {
    const auto done = [&] { return unfinished_.load(std::memory_order_acquire) == 0; };
    if (spin(kPatience, done)) return;
    for (int32_t left; (left = unfinished_.load(std::memory_order_acquire)) != 0;) {
      unfinished_.wait(left, std::memory_order_acquire);
    }
  }

  [[noreturn]] void help() {
    const OneThread one;
    const auto is_work = [&] { return (offer_.load(std::memory_order_acquire) & kLeft) != 0; };
    for (;;) {
      while (take()) {
      }
      if (spin(kAwake, is_work)) continue;
      const uint32_t calls = calls_.load();
      asleep_.fetch_add(1);
      if (!is_work()) calls_.wait(calls);
      asleep_.fetch_sub(1);
    }
  }

  std::mutex turn_;
  int64_t threads_ = 0;
  Piece piece_ = nullptr;
  const void* loop_ = nullptr;
  int64_t count_ = 0;
  std::mutex error_guard_;
  std::exception_ptr error_;
  // Each on a line of the cache of its own.
  alignas(64) std::atomic<uint64_t> offer_{0};
  alignas(64) std::atomic<int32_t> unfinished_{0};
  alignas(64) std::atomic<uint32_t> calls_{0};
  std::atomic<int64_t> asleep_{0};
};

// Never destroyed: its threads live as long as the process.
std::atomic<Helpers*> helpers{nullptr};

// Whether this process was forked: its parent has the threads of OpenMP's team, for which libgomp
// would wait for ever, and of the helpers.
std::atomic<bool> is_forked{false};

[[gnu::constructor]] void begin() {
  helpers = new Helpers;
  pthread_atfork(nullptr, nullptr, [] {
    helpers = new Helpers;
    is_forked = true;
  });
}

// When OpenMP's team may run a loop again.
class Pause {
 public:
  bool is_over() const { return Clock::now().time_since_epoch().count() >= end_.load(); }

  // The caller took `own` for its piece, and then waited for the others.
  void after_loop(Clock::duration own, Clock::duration waited) {
    if (waited < kLate || waited < kLateFactor * own) {
      // Only a pause that is over can be followed by a team's loop.
      length_.store(kFirstPause.count(), std::memory_order_relaxed);
      return;
    }
    const microseconds length(length_.load(std::memory_order_relaxed));
    length_.store(std::min(2 * length, kLongestPause).count(), std::memory_order_relaxed);
    end_.store((Clock::now() + length).time_since_epoch().count());
  }

 private:
  std::atomic<int64_t> end_{0}, length_{kFirstPause.count()};
};

Pause pause_of_team;

void run_by_team(int64_t count, Piece piece, const void* loop) {
  std::mutex guard;
  std::exception_ptr error;
  Clock::time_point begun = Clock::now(), done = begun;
  // Without a clause for their number: libgomp makes new threads whenever that changes.
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads();
    for (int64_t i = omp_get_thread_num(); i < count; i += threads) {
      try {
        piece(loop, i);
      } catch (...) {
        const std::lock_guard<std::mutex> own(guard);
        if (!error) error = std::current_exception();
      }
    }
    if (omp_get_thread_num() == 0) done = Clock::now();
  }
  pause_of_team.after_loop(done - begun, Clock::now() - done);
  if (error) std::rethrow_exception(error);
}

}  // namespace

int64_t thread_count() { return in_loop || at::in_parallel_region() ? 1 : at::get_num_threads(); }

void parallel::run(int64_t count, Piece piece, const void* loop) {
  if (pause_of_team.is_over() && !is_forked) {
    run_by_team(count, piece, loop);
  } else {
    helpers.load()->run(count, piece, loop);
  }
}

}  // namespace fastmeta
