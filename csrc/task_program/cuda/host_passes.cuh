// The passes, on executors of the host alone: those that launch kernels or record what these are to
// do. The passes are marked for device code too, which nvcc must not take for a call from there.
#pragma once

#pragma nv_diag_suppress 20011, 20014
#include "task_program/job.h"
