// Passes on executors of the host: executors that launch kernels or record their steps. The passes
// are marked for device code too; nvcc must not warn that they call host functions from there.
#pragma once

#pragma nv_diag_suppress 20011, 20014
#include "task_program/op_arguments.h"
