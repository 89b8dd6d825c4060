#include "emulator.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "fiber.h"
#include "source_line.h"

extern "C" void* __asan_region_is_poisoned(void* address, size_t bytes);
extern "C" void __asan_get_shadow_mapping(size_t* scale, size_t* offset);

namespace emulator {

Index thread_index, block_index, block_size, grid_size;

namespace {

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Thread {
  Fiber fiber;
  State state = State::kDone;
  Where where;  // it waits, and
  const char* operation = "";
  unsigned mask = 0;
  bool vote = false;
};

// A place in the sources, by the address of its file's name.
struct Place {
  const char* file = nullptr;
  unsigned line = 0;
  bool operator==(const Place&) const = default;
};

// The barriers that kernels came to, and the one that is left out. The sources have tens of them.
struct Barriers {
  std::vector<Place> reached;
  std::string removed_file;
  unsigned removed_line = 0;  // 0: none is left out
  Place last;                 // most threads come to where the one before them did
};

// The settings of a launch, its running block, and the report.
struct Machine {
  Order order = Order::kNatural;
  std::mt19937_64 random;
  int64_t first_block = 0, block_count = std::numeric_limits<int64_t>::max();

  const std::function<void()>* body = nullptr;
  std::vector<Thread> threads{kMaxThreads};
  int size = 0;         // threads of the block
  int running = -1;     // thread, or -1: the scheduler, or the host
  uintptr_t stack = 0;  // where the running thread's begins
  int votes = 0;
  Lanes offered[kMaxThreads / kWarp], released[kMaxThreads / kWarp];
  std::vector<int> turns;  // in which order the threads are resumed
  SharedMemory shared;
  Barriers barriers;
  std::string report;
} machine;

std::string number(int64_t value) { return std::to_string(value); }

std::string name(int thread) {
  return "thread " + number(thread) + " of block " + number(block_index.x);
}

std::string doing(const Thread& thread) {
  if (thread.state == State::kDone) return "has exited";
  return std::string("waits at ") + thread.operation + " of " + thread.where.file_name() + ":" +
         number(thread.where.line());
}

bool is_same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool is_together(const Thread& a, const Thread& b) {
  return a.state == b.state && a.mask == b.mask && a.where.line() == b.where.line() &&
         is_same(a.operation, b.operation) && is_same(a.where.file_name(), b.where.file_name());
}

void record(const Place& place) {
  auto& barriers = machine.barriers;
  if (place == barriers.last) return;
  barriers.last = place;
  auto& reached = barriers.reached;
  if (std::find(reached.begin(), reached.end(), place) == reached.end()) reached.push_back(place);
}

bool is_removed(const Where& where) {
  const auto& barriers = machine.barriers;
  return where.line() == barriers.removed_line && where.file_name() == barriers.removed_file;
}

void suspend(State state) {
  auto& thread = machine.threads[machine.running];
  thread.state = state;
  thread.fiber.suspend();
}

void wait(State state, const char* operation, unsigned mask, const Where& where) {
  auto& thread = machine.threads[machine.running];
  thread.operation = operation;
  thread.mask = mask;
  thread.where = where;
  suspend(state);
}

void run_thread() {
  (*machine.body)();
  suspend(State::kDone);
  std::abort();  // nothing resumes a thread that is done
}

template <typename Items>
void arrange(Items begin, Items end) {
  if (machine.order == Order::kReversed) std::reverse(begin, end);
  if (machine.order == Order::kShuffled) std::shuffle(begin, end, machine.random);
}

void resume_ready_threads() {
  machine.turns.resize(machine.size);
  std::iota(machine.turns.begin(), machine.turns.end(), 0);
  arrange(machine.turns.begin(), machine.turns.end());
  for (const int i : machine.turns) {
    if (machine.threads[i].state != State::kReady) continue;
    machine.running = i;
    machine.stack = machine.threads[i].fiber.stack();
    thread_index.x = static_cast<unsigned>(i);
    machine.threads[i].fiber.resume();
    machine.running = -1;
    if (!machine.report.empty()) return;
  }
}

void report_wait(int waiting, int missing) {
  const Thread none;  // has exited, like a lane that the block is too small for
  const Thread& other = missing < machine.size ? machine.threads[missing] : none;
  machine.report = name(waiting) + " " + doing(machine.threads[waiting]) + " for thread " +
                   number(missing) + ", which " + doing(other);
}

// The first of the lanes that a thread waits for that has not come, or -1.
int missing_lane(int waiting) {
  const Thread& thread = machine.threads[waiting];
  for (unsigned rest = thread.mask; rest != 0; rest &= rest - 1) {
    const int other = waiting / kWarp * kWarp + std::countr_zero(rest);
    if (other >= machine.size || !is_together(machine.threads[other], thread)) return other;
  }
  return -1;
}

// Lets the lanes that `waiting` waits for go on if all of them have come.
bool release_lanes(int waiting) {
  const Thread& thread = machine.threads[waiting];
  const int missing = missing_lane(waiting);
  if (missing >= 0) {
    const bool has_exited =
        missing >= machine.size || machine.threads[missing].state == State::kDone;
    if (has_exited) report_wait(waiting, missing);
    return false;
  }
  const int warp = waiting / kWarp;
  for (unsigned rest = thread.mask; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    machine.threads[warp * kWarp + lane].state = State::kReady;
    std::memcpy(machine.released[warp].value[lane], machine.offered[warp].value[lane],
                Lanes::kMaxBytes);
  }
  if (is_same(thread.operation, kSyncWarp)) {
    machine.shared.synchronize_warp(warp, thread.mask);
  }
  return true;
}

bool release_warps() {
  bool any = false;
  for (int i = 0; i < machine.size && machine.report.empty(); ++i) {
    if (machine.threads[i].state == State::kAtWarp) any |= release_lanes(i);
  }
  return any;
}

// Lets the block go on if all of its threads are at the same barrier; else this is a deadlock.
void release_block() {
  const auto begin = machine.threads.begin(), end = begin + machine.size;
  const auto is_at = [](State state) { return [=](const Thread& t) { return t.state == state; }; };
  const auto in_warp = std::find_if(begin, end, is_at(State::kAtWarp));
  if (in_warp != end) {
    const int waiting = static_cast<int>(in_warp - begin);
    return report_wait(waiting, missing_lane(waiting));
  }
  const auto first = std::find_if(begin, end, is_at(State::kAtBarrier));
  const auto is_elsewhere = [&](const Thread& thread) { return !is_together(thread, *first); };
  const auto missing = std::find_if(begin, end, is_elsewhere);
  if (missing != end) {
    return report_wait(static_cast<int>(first - begin), static_cast<int>(missing - begin));
  }
  machine.votes = 0;
  for (auto thread = begin; thread != end; ++thread) {
    machine.votes += thread->vote;
    thread->state = State::kReady;
  }
  machine.shared.barrier();
}

void run_block() {
  const auto begin = machine.threads.begin(), end = begin + machine.size;
  for (auto thread = begin; thread != end; ++thread) {
    thread->fiber.start(run_thread);
    thread->state = State::kReady;
  }
  const auto is_done = [](const Thread& thread) { return thread.state == State::kDone; };
  while (machine.report.empty()) {
    resume_ready_threads();
    if (!machine.report.empty() || std::all_of(begin, end, is_done)) return;
    if (!release_warps() && machine.report.empty()) release_block();
  }
}

#if defined(__x86_64__)
// AddressSanitizer keeps a byte of shadow for every eight of memory: 0 where all of them belong to an
// allocation. Lower addresses may have none, since the shadow itself is there.
const struct Shadow {
  Shadow() { __asan_get_shadow_mapping(&scale, &offset); }
  size_t scale = 0, offset = 0;
} shadow;

bool is_clear(uintptr_t address) {
  constexpr uintptr_t kFirst = uintptr_t{1} << 45, kEnd = uintptr_t{1} << 47;
  return address >= kFirst && address < kEnd &&
         *reinterpret_cast<const char*>((address >> shadow.scale) + shadow.offset) == 0;
}
#else
bool is_clear(uintptr_t) { return false; }
#endif

bool is_allocated(uintptr_t first, size_t bytes) {
  if (first % 8 + bytes <= 8 && is_clear(first)) return true;
  return __asan_region_is_poisoned(reinterpret_cast<void*>(first), bytes) == nullptr;
}

std::vector<int64_t> chosen_blocks(int64_t blocks) {
  const int64_t start =
      machine.first_block < 0 ? blocks + machine.first_block : machine.first_block;
  const int64_t first = std::clamp<int64_t>(start, 0, blocks);
  std::vector<int64_t> chosen(std::min(machine.block_count, blocks - first));
  std::iota(chosen.begin(), chosen.end(), first);
  arrange(chosen.begin(), chosen.end());
  return chosen;
}

}  // namespace

std::string run(int64_t blocks, int threads, size_t shared_bytes,
                const std::function<void()>& thread) {
  machine.body = &thread;
  machine.size = threads;
  machine.report.clear();
  block_size = {static_cast<unsigned>(threads), 1, 1};
  grid_size = {static_cast<unsigned>(blocks), 1, 1};
  for (const int64_t block : chosen_blocks(blocks)) {
    block_index.x = static_cast<unsigned>(block);
    machine.shared.begin_block(shared_bytes);
    run_block();
    if (!machine.report.empty()) break;
  }
  return machine.report;
}

int count_at_barrier(bool vote, Where where) {
  record({where.file_name(), where.line()});
  if (is_removed(where)) return 0;
  machine.threads[machine.running].vote = vote;
  wait(State::kAtBarrier, "__syncthreads", 0, where);
  return machine.votes;
}

const Lanes& exchange(const char* operation, unsigned mask, const void* value, size_t bytes,
                      Where where) {
  const int warp = machine.running / kWarp;
  if (bytes == 0) {  // __syncwarp
    record({where.file_name(), where.line()});
    if (is_removed(where)) return machine.released[warp];
  }
  if ((mask >> lane() & 1) == 0) {
    fail(std::string("calls ") + operation + " with a mask that does not name its own lane");
  }
  if (bytes > 0) std::memcpy(machine.offered[warp].value[lane()], value, bytes);
  wait(State::kAtWarp, operation, mask, where);
  return machine.released[warp];  // what is offered next is released when all have read this
}

int lane() { return machine.running % kWarp; }

void* dynamic_shared_memory() { return machine.shared.dynamic(); }

void fail(const std::string& what) {
  if (machine.running < 0) {
    std::fprintf(stderr, "the host code of a kernel %s\n", what.c_str());
    std::abort();
  }
  machine.report = name(machine.running) + " " + what;
  suspend(State::kDone);
  std::abort();
}

void check_access(const void* address, size_t bytes, Access kind, const void* code) {
  const auto first = reinterpret_cast<uintptr_t>(address);
  if (machine.running >= 0) {
    if (first - machine.stack < Fiber::kStackBytes) return;
    if (auto* array = machine.shared.find(first)) {
      if (machine.shared.access(*array, machine.running, first, bytes, kind)) return;
      fail(machine.shared.error() + "\n" + source_line(code));
    }
  }
  if (is_allocated(first, bytes)) return;
  fail(std::string(kind == Access::kRead ? "reads " : "writes ") + number(bytes) +
       " bytes of global memory that belong to no allocation\n" + source_line(code));
}

void set_order(Order order, uint64_t seed) {
  machine.order = order;
  machine.random.seed(seed);
}

void remove_barrier(const std::string& file, unsigned line) {
  machine.barriers.removed_file = file;
  machine.barriers.removed_line = line;
}

std::string take_barriers() {
  std::string text;
  for (const auto& [file, line] : machine.barriers.reached) {
    text += std::string(file) + ":" + number(line) + "\n";
  }
  machine.barriers.reached.clear();
  machine.barriers.last = {};
  return text;
}

void run_only(int64_t first, int64_t count) {
  machine.first_block = first;
  machine.block_count = count;
}

SharedMemory& shared_memory() { return machine.shared; }

}  // namespace emulator
