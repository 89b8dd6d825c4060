// Where in the sources an instruction of a loaded library comes from.
#pragma once

#include <string>

namespace emulator {

// Function, file and line, and those that they are inlined into, as addr2line tells them.
std::string source_line(const void* code);

}  // namespace emulator
