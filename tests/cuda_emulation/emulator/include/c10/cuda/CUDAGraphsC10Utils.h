#pragma once

#include "runtime.h"

namespace c10::cuda {

enum class CaptureStatus { None, Active };

inline CaptureStatus currentStreamCaptureStatusMayInitCtx() {
  return emulator::is_capturing() ? CaptureStatus::Active : CaptureStatus::None;
}

}  // namespace c10::cuda
