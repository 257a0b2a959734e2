// The list of kernels that several objects make together.
#pragma once

#include <cstddef>

#include "kernels.h"

namespace dpcomm::emulated {

struct SourceKernel {
  const char* name;
  KernelBody body;
};

/// Puts kernels on the list, when a program starts.
struct SourcePart {
  SourcePart(const SourceKernel* kernels, size_t count)
      : kernels(kernels), count(count), next(first) {
    first = this;
  }
  const SourceKernel* kernels;
  size_t count;
  SourcePart* next;
  static SourcePart* first;
};

}  // namespace dpcomm::emulated
