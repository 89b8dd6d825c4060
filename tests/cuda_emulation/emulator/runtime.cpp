#include "runtime.h"

#include <dlfcn.h>
#include <link.h>

#include <array>
#include <cstdlib>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "emulator.h"

namespace emulator {
namespace {

constexpr int kDevices = 2, kStreams = 2;
constexpr int kSharedWithoutConsent = 48 * 1024;

struct Record {
  Launch launch;
  int64_t device;  // that was current
  int64_t stream;  // of the device; -1 where it belongs to another one
};

struct Runtime {
  int device = 0;
  int device_of_tensors = 0;
  std::array<std::array<EmulatedStream, kStreams>, kDevices> streams{{{{{0}, {0}}}, {{{1}, {1}}}}};
  std::array<int, kDevices> current_streams{};
  bool is_capturing = false;
  int multiprocessors = 2;                        // few, so that small tensors are enough for them
  int shared_memory = SharedMemory::kMaxDynamic;  // bytes that a block can have
  // Few, so that tens of tasks, and small gradients, take several turns.
  int64_t task_bytes = 16384, chunk = 8192;
  cudaError_t error = cudaSuccess;
  int64_t launches_until_failure = -1;  // -1: none fails
  std::map<const void*, int> consents;  // bytes of dynamic shared memory
  std::vector<Record> launches;
  std::string report = "unspecified launch failure";
} runtime;

int index_of(cudaStream_t stream) {
  const auto& streams = runtime.streams[runtime.device];
  for (int i = 0; i < kStreams; ++i) {
    if (stream == &streams[i]) return i;
  }
  return -1;
}

cudaError_t refusal(const Launch& launch) {
  if (launch.blocks == 0) return cudaErrorInvalidConfiguration;
  if (runtime.launches_until_failure == 0) return cudaErrorLaunchOutOfResources;
  if (launch.threads < 1 || launch.threads > kMaxThreads) return cudaErrorInvalidConfiguration;
  const auto consent = runtime.consents.find(launch.kernel);
  const int allowed = consent == runtime.consents.end() ? kSharedWithoutConsent : consent->second;
  return launch.shared_bytes > static_cast<size_t>(allowed) ? cudaErrorInvalidValue : cudaSuccess;
}

// As CUDA does: the error is returned, and the next cudaGetLastError() returns it too.
cudaError_t failed(cudaError_t error) { return runtime.error = error; }

}  // namespace

cudaError_t launch(const Launch& launch, const std::function<void()>& thread) {
  const cudaError_t refused = refusal(launch);
  if (runtime.launches_until_failure >= 0) --runtime.launches_until_failure;
  if (refused != cudaSuccess) return failed(refused);
  runtime.launches.push_back({launch, runtime.device, index_of(launch.stream)});
  const auto report = run(launch.blocks, launch.threads, launch.shared_bytes, thread);
  if (report.empty()) return cudaSuccess;
  runtime.report = report;
  return failed(cudaErrorLaunchFailure);
}

cudaStream_t current_stream() {
  return &runtime.streams[runtime.device][runtime.current_streams[runtime.device]];
}

int device_of_tensors() { return runtime.device_of_tensors; }

bool is_capturing() { return runtime.is_capturing; }

int64_t task_bytes() { return runtime.task_bytes; }

int64_t chunk() { return runtime.chunk; }

}  // namespace emulator

using emulator::runtime;

cudaError_t cudaGetLastError() { return std::exchange(runtime.error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorLaunchFailure:
      return runtime.report.c_str();
  }
  return "unknown error";
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || value > runtime.shared_memory) return emulator::failed(cudaErrorInvalidValue);
  runtime.consents[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = runtime.device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulator::kDevices) return cudaErrorInvalidDevice;
  runtime.device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value =
      attribute == cudaDevAttrMultiProcessorCount ? runtime.multiprocessors : runtime.shared_memory;
  return cudaSuccess;
}

// For emulator.py.
extern "C" {

void emulator_set_order(int order, uint64_t seed) {
  emulator::set_order(static_cast<emulator::Order>(order), seed);
}

void emulator_remove_barrier(const char* file, unsigned line) {
  emulator::remove_barrier(file, line);
}

const char* emulator_take_barriers() {
  static std::string text;
  text = emulator::take_barriers();
  return text.c_str();
}

void emulator_run_only(int64_t first, int64_t count) { emulator::run_only(first, count); }

// An array at `offset` in the library of a dlopen() handle, whose memory ends at offset `end`.
void emulator_add_shared(void* library, uintptr_t offset, size_t bytes, uintptr_t end,
                         const char* name) {
  const link_map* map = nullptr;
  if (dlinfo(library, RTLD_DI_LINKMAP, &map) != 0) std::abort();
  const auto base = map->l_addr;
  emulator::shared_memory().add_static(base + offset, bytes, base + end, name);
}

void emulator_set_device(int current, int of_tensors) {
  runtime.device = current;
  runtime.device_of_tensors = of_tensors;
}

int emulator_device() { return runtime.device; }

void emulator_set_stream(int device, int stream) { runtime.current_streams[device] = stream; }

void emulator_set_capturing(bool is_capturing) { runtime.is_capturing = is_capturing; }

void emulator_set_multiprocessors(int count) { runtime.multiprocessors = count; }

void emulator_set_shared_memory(int bytes) { runtime.shared_memory = bytes; }

void emulator_set_turns(int64_t task_bytes, int64_t chunk) {
  runtime.task_bytes = task_bytes;
  runtime.chunk = chunk;
}

// The error that the next cudaGetLastError() returns.
void emulator_leave_error(int error) { runtime.error = static_cast<cudaError_t>(error); }

int emulator_take_error() { return cudaGetLastError(); }

// The launch after `launches` more fails; -1: none does.
void emulator_fail_after(int64_t launches) { runtime.launches_until_failure = launches; }

int64_t emulator_launch_count() { return static_cast<int64_t>(runtime.launches.size()); }

// Blocks, threads, bytes of dynamic shared memory, device and stream of a launch, and the offset of
// its kernel in its library.
void emulator_launch(int64_t index, int64_t* fields) {
  const auto& [launch, device, stream] = runtime.launches[index];
  Dl_info library{};
  dladdr(launch.kernel, &library);
  fields[0] = launch.blocks;
  fields[1] = launch.threads;
  fields[2] = static_cast<int64_t>(launch.shared_bytes);
  fields[3] = device;
  fields[4] = stream;
  fields[5] = static_cast<const char*>(launch.kernel) - static_cast<char*>(library.dli_fbase);
}

// The path of the kernel's library, and what is known of its arguments.
const char* emulator_launch_library(int64_t index) {
  Dl_info library{};
  dladdr(runtime.launches[index].launch.kernel, &library);
  return library.dli_fname;
}

const char* emulator_launch_facts(int64_t index) {
  return runtime.launches[index].launch.facts.c_str();
}

void emulator_forget_launches() { runtime.launches.clear(); }

const char* emulator_report() { return runtime.report.c_str(); }
}
