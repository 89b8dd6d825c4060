#include "source_line.h"

#include <dlfcn.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <memory>

namespace emulator {

std::string source_line(const void* code) {
  Dl_info library;
  if (dladdr(code, &library) == 0) return "";
  const auto offset = reinterpret_cast<uintptr_t>(code) -
                      reinterpret_cast<uintptr_t>(library.dli_fbase) - 1;  // inside the call
  std::array<char, 64> hex;
  std::snprintf(hex.data(), hex.size(), "%#zx", static_cast<size_t>(offset));
  const std::string command =
      "LD_PRELOAD= addr2line --demangle --functions --inlines --pretty-print "
      "--exe '" +
      std::string(library.dli_fname) + "' " + hex.data();
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command.c_str(), "r"), pclose);
  std::string text;
  std::array<char, 512> part;
  while (pipe && std::fgets(part.data(), part.size(), pipe.get())) text += part.data();
  return text;
}

}  // namespace emulator
