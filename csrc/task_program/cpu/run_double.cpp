#include "task_program/cpu/run.h"
#include "task_program/cpu/workers.h"

namespace fastmeta {

template <>
void run_on_cpu<double>(const Job& job) {
  run_with_threads<double>(job);
}

}  // namespace fastmeta
