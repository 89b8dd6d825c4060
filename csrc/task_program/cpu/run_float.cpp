#include "task_program/cpu/run.h"
#include "task_program/cpu/workers.h"

namespace fastmeta {

template <>
void run_on_cpu<float>(const OpArguments& args) {
  run_with_threads<float>(args);
}

}  // namespace fastmeta
